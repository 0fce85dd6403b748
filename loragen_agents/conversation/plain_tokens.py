"""Text to token ids, with the tokens that control the chat switched on or off.

Control tokens open roles and close turns. Only the markers around turns may hold them; in text from outside they come
out as the characters they are written with. Knows tokenizers, but neither chat templates nor steps.
"""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from loragen_agents.errors import PromptError


def tokenizer_name(tokenizer: Any) -> str:
    """How error messages call a tokenizer."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def live_backend(tokenizer: Any) -> Tokenizer:
    """A copy of the tokenizer's fast backend that reads control tokens as such, without padding and truncation.

    Raises:
        PromptError: the tokenizer has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise PromptError(
            f"{tokenizer_name(tokenizer)}: the tokenizer has no fast backend; use a model with a tokenizer.json"
        )
    live = Tokenizer.from_str(backend.to_str())
    live.no_padding()
    live.no_truncation()
    live.encode_special_tokens = False
    return live


class PlainTokenizer:
    """Tokenises text from outside. Works on a copy of the backend, whose settings nobody else can change.

    Attributes:
        control: id and spelling of every token that controls the chat.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        live: its backend, as `live_backend` gives it.
        marker_ids: tokens of the markers around turns; added tokens among them count as control tokens.
    """

    def __init__(self, tokenizer: Any, live: Tokenizer, marker_ids: Iterable[int]) -> None:
        in_markers = frozenset(marker_ids)
        settings = json.loads(live.to_str())
        self.control: dict[int, str] = {}
        self._name = tokenizer_name(tokenizer)
        for token in settings.get("added_tokens", ()):
            content = token["content"]
            # A turn marker may be an added token without the special flag; the "\n" of a marker is no control token.
            if token["id"] in in_markers and content.strip() and not content.strip().isalnum():
                token["special"] = True
            if token["special"]:
                self.control[token["id"]] = content
        for content in tokenizer.all_special_tokens:
            self.control.setdefault(tokenizer.convert_tokens_to_ids(content), content)
        self._backend = Tokenizer.from_str(json.dumps(settings))
        self._backend.encode_special_tokens = True

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and the place in it of the first character of every token.

        Lone surrogates, which no tokenizer takes, become U+FFFD.

        Raises:
            PromptError: a control token is a single character, which can't be split.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        starts: list[int] = []
        done = 0
        while text:
            encoding = self._backend.encode(text, add_special_tokens=False)
            cut = None
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in self.control and text[start:end].strip() == self.control[token]:
                    cut = start + 1
                    break
            if cut is None:
                return ids + encoding.ids, starts + [done + start for start, _ in encoding.offsets]
            # Some vocabularies (Unigram) hold control tokens as ordinary pieces; split inside, none is left.
            if cut >= len(text) and cut == start + len(self.control[token]):
                raise PromptError(f"{self._name}: the control token {text!r} is a single character and can't be quoted")
            encoding = self._backend.encode(text[:cut], add_special_tokens=False)
            ids += encoding.ids
            starts += [done + start for start, _ in encoding.offsets]
            text, done = text[cut:], done + cut
        return ids, starts
