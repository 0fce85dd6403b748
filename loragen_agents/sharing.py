"""What is made once for a loaded model and serves many: module trees over the same tensors, a tokenizer's renderer."""

import copy
import threading
import weakref

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loragen_agents.errors import ModelLoadError
from loragen_agents.prompting import PromptRenderer

_renderers: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, PromptRenderer]" = weakref.WeakKeyDictionary()
_renderers_lock = threading.Lock()


def clone_sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the module tree of `model`; every parameter and buffer of the copy is that of `model` itself.

    A parameter that is then replaced in the copy (`module.weight = ...`), or a module that is wrapped there, leaves
    `model` as it is. What changes a shared tensor in place shows in both.

    Raises:
        ModelLoadError: the model was spread over devices by Accelerate, whose hooks are bound to the original modules.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelLoadError(
            f"{type(model).__name__} is spread over several devices; load it on one device to specialise it"
        )
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def shared_renderer(tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """The renderer of the package's own prompts for a tokenizer, made once (it copies the whole vocabulary) and kept.

    Raises:
        PromptError: see `PromptRenderer`.
    """
    with _renderers_lock:
        if tokenizer not in _renderers:
            _renderers[tokenizer] = PromptRenderer(tokenizer)
        return _renderers[tokenizer]
