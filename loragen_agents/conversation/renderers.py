"""One prompt renderer for each tokenizer, made once and kept as long as the tokenizer."""

import threading
import weakref

from transformers import PreTrainedTokenizerBase

from loragen_agents.conversation.prompts import PromptRenderer

_renderers: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, PromptRenderer]" = weakref.WeakKeyDictionary()
_renderers_lock = threading.Lock()


def shared_renderer(tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """The renderer of the package's own prompts for a tokenizer, made once (it copies the whole vocabulary) and kept.

    Raises:
        PromptError: see `PromptRenderer`.
    """
    with _renderers_lock:
        if tokenizer not in _renderers:
            _renderers[tokenizer] = PromptRenderer(tokenizer)
        return _renderers[tokenizer]
