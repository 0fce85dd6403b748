"""LoRA-Gen for agents: a tool registry becomes LoRA weights, and a small language model sees only the user's turn.

The names below are imported on first use, so that `import loragen_agents.registry` and the command line start without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loragen_agents.adapter.lora_weights import LoRAWeights as LoRAWeights
    from loragen_agents.chat.chat_models import LoRAGenChatModel as LoRAGenChatModel
    from loragen_agents.generator import LoRAGenerator as LoRAGenerator
    from loragen_agents.models.language_models import load_language_model as load_language_model
    from loragen_agents.registry import Tool as Tool
    from loragen_agents.registry import ToolRegistry as ToolRegistry
    from loragen_agents.specialization.specialize import specialize as specialize

__version__ = "0.1.0"

_EXPORTS = {
    "LoRAGenChatModel": "loragen_agents.chat.chat_models",
    "LoRAGenerator": "loragen_agents.generator",
    "LoRAWeights": "loragen_agents.adapter.lora_weights",
    "Tool": "loragen_agents.registry",
    "ToolRegistry": "loragen_agents.registry",
    "load_language_model": "loragen_agents.models.language_models",
    "specialize": "loragen_agents.specialization.specialize",
}
__all__ = [
    "LoRAGenChatModel",
    "LoRAGenerator",
    "LoRAWeights",
    "Tool",
    "ToolRegistry",
    "__version__",
    "load_language_model",
    "specialize",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
