"""Several sequences generated together: what each has written, what may come next, and when it ends."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.completion import Completion, FinishReason, PrefilledPrompt, prompt_tokens
from loragen_agents.edge.feeding import feed, updated_layers
from loragen_agents.edge.grammar import GrammarMatcher, ToolGrammar
from loragen_agents.edge.guides import Guided
from loragen_agents.edge.kv_cache import extended
from loragen_agents.edge.passes import Cache, Forward, RowUpdates
from loragen_agents.edge.sampling import Sampling, pick
from loragen_agents.edge.text_stream import TextStream

if TYPE_CHECKING:
    from loragen_agents.edge.decoding import Decoder

# Slots to set aside for what is generated; more are added when they are needed.
_ROOM = 256


class GeneratedSequence:
    """One sequence of a run: what was generated for it, and what its next token may be."""

    def __init__(
        self,
        decoder: "Decoder",
        prompt: Sequence[int] | PrefilledPrompt,
        sampling: Sampling,
        grammar: ToolGrammar | None,
        updates: DownUpdates | None,
        guided: Guided | None = None,
    ) -> None:
        self.prompt = prompt
        self.updates = updates
        self.history = (
            extended(prompt.history, len(prompt.token_ids), updates)
            if isinstance(prompt, PrefilledPrompt)
            else extended((), 0, updates)
        )
        self.limit = min(sampling.max_tokens, decoder._room(prompt))
        self.sampling = sampling
        self.grammar = grammar
        self.matcher: GrammarMatcher | None = None
        self.guide = None if guided is None else guided.guide()
        closing = () if grammar is None else (grammar.closing,)
        self.text = TextStream(decoder.tokenizer, prompt_tokens(prompt), sampling.stop, closing)
        self.stop_token_ids = decoder.stop_token_ids
        self.generator: torch.Generator | None = None
        self.tokens: list[int] = []
        # Tokens that the model has not read yet.
        self.pending: list[int] = []
        self.reason: FinishReason | None = None
        self.cached = 0
        self.first_seconds: float | None = None
        self.seconds = 0.0

    def prepare(self, decoder: "Decoder") -> None:
        """Add what the grammar forces at the beginning."""
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)
        if self.grammar is not None:
            size = decoder.model.config.get_text_config(decoder=True).vocab_size
            self.matcher = self.grammar.matcher(size, sorted(self.stop_token_ids))
            self._extend(self._forced())

    def begin(self, known: int, cached: int) -> None:
        """Leave to be read what follows the first `known` tokens, of which the first `cached` were not read for it."""
        prompt = prompt_tokens(self.prompt)
        self.cached = min(cached, len(prompt))
        self.pending = [*prompt, *self.tokens][known:]

    def choose(self, logits: Tensor) -> None:
        """Take the next token by logits of shape (vocabulary,), and all that the grammar then forces."""
        scores = logits.to(torch.float32, copy=True)
        if self.guide is not None:
            self.guide.add(scores)
        if self.matcher is not None:
            self.matcher.mask(scores)
        token = pick(scores, self.sampling, self.generator)
        self.pending = []
        if self.matcher is not None:
            self.matcher.accept([token])
        self._extend([token, *self._forced()])

    def _forced(self) -> list[int]:
        if self.matcher is None:
            return []
        forced = self.matcher.forced_tokens()
        self.matcher.accept(forced)
        return forced

    def _extend(self, tokens: list[int]) -> None:
        """Add tokens, which the grammar has accepted already, up to the first that ends the sequence."""
        for place, token in enumerate(tokens, start=1):
            self.tokens.append(token)
            self.pending.append(token)
            if self.guide is not None:
                self.guide.accept(token)
            if token not in self.stop_token_ids:
                self.text.push(token)
            complete = self.matcher is not None and self.matcher.finished and place == len(tokens)
            if token in self.stop_token_ids or self.text.stopped or complete:
                self.reason = "stop"
                return
            if len(self.tokens) == self.limit:
                self.reason = "length"
                return

    def end(self, seconds: float) -> None:
        if self.reason is None:
            self.reason = "cancelled"
        self.seconds = seconds
        complete = self.reason == "stop" and self.grammar is not None
        self.text.finish(self.grammar.closing if complete and self.grammar is not None else "")

    def completion(self) -> Completion:
        assert self.reason is not None
        return Completion(
            text=self.text.text,
            token_ids=tuple(self.tokens),
            finish_reason=self.reason,
            prompt_tokens=len(prompt_tokens(self.prompt)),
            cached_tokens=self.cached,
            first_token_seconds=self.seconds if self.first_seconds is None else self.first_seconds,
            seconds=self.seconds,
        )


class Run:
    """Several sequences generated together, one row of a cache for each that is not finished."""

    def __init__(
        self,
        decoder: "Decoder",
        prompts: Sequence[Sequence[int] | PrefilledPrompt],
        sampling: Sampling,
        grammars: Sequence[ToolGrammar | None],
        cancel: threading.Event | None,
        updates: RowUpdates,
        guided: Sequence[Guided | None],
    ) -> None:
        self._decoder = decoder
        self._cancel = cancel
        self.sequences = [
            GeneratedSequence(decoder, prompt, sampling, grammar, own, by)
            for prompt, grammar, own, by in zip(prompts, grammars, updates, guided, strict=True)
        ]
        self.ended = False
        self._rows = self.sequences
        self._forward: Forward | None = None
        self._cache: Cache | None = None
        self._started = 0.0

    # Entered step by step: a mode held open between steps would apply to the code that reads the stream.
    @torch.inference_mode()
    def step(self) -> bool:
        """Read what is pending and choose each row's next token; False once there is nothing left to do."""
        if self._forward is None:
            self._started = time.perf_counter()
        if self._cancelled():
            return False
        if self._forward is None or self._cache is None:
            self._begin()
            if self._cancelled():
                return False
        assert self._forward is not None and self._cache is not None
        self._drop_finished()
        if not self._rows:
            return False
        device = self._decoder.model.device
        pending, updates = [row.pending for row in self._rows], [row.updates for row in self._rows]
        logits = feed(self._forward, self._cache, pending, device, updates, self._cancelled)
        for row, scores in zip(self._rows, logits, strict=True):
            if scores is None and isinstance(row.prompt, PrefilledPrompt) and not row.pending:
                scores = row.prompt.logits
            if scores is not None:
                row.choose(scores)
                if row.first_seconds is None:
                    row.first_seconds = time.perf_counter() - self._started
                row.seconds = time.perf_counter() - self._started
        return True

    def end(self) -> None:
        """Settle what is left: unfinished sequences count as cancelled. A single one is kept as a prefix (float32)."""
        if self.ended:
            return
        self.ended = True
        now = time.perf_counter() - self._started if self._started else 0.0
        for sequence in self.sequences:
            sequence.end(sequence.seconds or now)
        kept = len(self.sequences) == 1 and not self._decoder._aligned
        if kept and self._cache is not None and self._cache.lengths[0]:
            (only,) = self.sequences
            read = [*prompt_tokens(only.prompt), *only.tokens][: self._cache.lengths[0]]
            with torch.inference_mode():
                self._decoder.prefixes.add(read, self._cache.snapshot(0), history=only.history)
        self._cache = None  # a stream may be kept for long after it was read

    def _begin(self) -> None:
        self._forward = self._decoder._forward()
        room = min(_ROOM, max(sequence.limit for sequence in self.sequences))
        for sequence in self.sequences:
            sequence.prepare(self._decoder)
        prompts, forced = zip(*((sequence.prompt, sequence.tokens) for sequence in self.sequences), strict=True)
        histories = [sequence.history for sequence in self.sequences]
        layers = updated_layers([sequence.updates for sequence in self.sequences])
        self._cache, known, cached = self._decoder._opened(
            self._forward, prompts, histories, room, forced, self._cancelled, layers
        )
        for sequence, *lengths in zip(self.sequences, known, cached, strict=True):
            sequence.begin(*lengths)

    def _drop_finished(self) -> None:
        assert self._cache is not None
        left = [place for place, row in enumerate(self._rows) if row.reason is None]
        if left and len(left) < len(self._rows):
            self._cache.keep(left)
        self._rows = [self._rows[place] for place in left]

    def _cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()


class CompletionStream:
    """Iterates over the pieces of a completion's text while it is generated. `completion` has the whole at the end."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._sequence = run.sequences[0]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._run.ended:
            if not self._run.step():
                self._run.end()
            piece = self._sequence.text.ready()
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop generating; what was generated so far is kept in `completion`, as cancelled."""
        self._run.end()

    @property
    def completion(self) -> Completion:
        """The whole.

        Raises:
            RuntimeError: the stream was neither read to its end nor closed.
        """
        if not self._run.ended:
            raise RuntimeError("the completion is known once the stream has been read to its end or closed")
        return self._sequence.completion()
