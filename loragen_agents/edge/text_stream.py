"""Token ids to text while they are generated: whole characters only, cut at the first stop string.

A token may end inside a character, and text may turn out to be the beginning of a stop string; both are held back until
they are settled. Knows nothing of models.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loragen_agents.conversation.stop_texts import cut_at_first, held_back

# What decoders write for the bytes of a character that is not complete (or never will be).
_UNFINISHED = "\ufffd"
# Some tokenizers drop a blank at the beginning of a text; behind some tokens of the prompt, nothing is there.
_CONTEXT = 4


class TextStream:
    """Collects the text of one sequence.

    Args:
        tokenizer: decodes; control tokens give no text.
        prompt: the tokens before the first one that is pushed.
        stop: texts at which the sequence ends; neither they nor what follows is part of it.
        held: texts that may turn out to be no part of it (see `finish`), and are held back like stop strings.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        held: Sequence[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        # Text is decoded from the end of the last piece that was settled, together with that piece.
        self._piece_start = 0
        self._piece_end = len(self._ids)
        self._settled = ""
        self._open = ""
        self._stop = tuple(text for text in stop if text)
        self._held = self._stop + tuple(held)
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far, without what would be cut, with what is still held back."""
        return self._settled + self._open

    def push(self, token: int) -> None:
        """Add a token; sets `stopped` once a stop string is complete."""
        if self.stopped:
            return
        self._ids.append(token)
        before = self._decode(self._piece_start, self._piece_end)
        now = self._decode(self._piece_start, len(self._ids))[len(before) :]
        if now.endswith(_UNFINISHED):
            self._open = now
            return
        searched = len(self._settled)
        self._settled += now
        self._open = ""
        self._piece_start, self._piece_end = self._piece_end, len(self._ids)
        self._cut(searched)

    def ready(self) -> str:
        """Text that has become certain since the last call."""
        end = len(self._settled)
        if not self.stopped:
            end -= held_back(self._settled, self._held)
        if end <= self._sent:
            return ""
        delta = self._settled[self._sent : end]
        self._sent = end
        return delta

    def finish(self, closing: str = "") -> None:
        """End the text, without `closing` if that is its end; `ready` then gives all that is left."""
        if not self.stopped:
            searched = len(self._settled)
            self._settled, self._open = self._settled + self._open, ""
            self._cut(searched)
            if closing and self._settled.endswith(closing):
                self._settled = self._settled[: -len(closing)]
            self.stopped = True

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _cut(self, searched: int) -> None:
        """Cut at the first stop string that is not wholly within the first `searched` characters."""
        longest = max(map(len, self._stop), default=0)
        self._settled, found = cut_at_first(self._settled, self._stop, max(0, searched - longest + 1))
        self.stopped = self.stopped or found
