"""Decoding: prompts to text, one token after another, streamed or in batches, free or held to a grammar.

A `Decoder` belongs to one model. It keeps the keys and values of prefixes that it has read, so that the next step of an
agent, whose prompt begins with the last one, reads only what is new; every request works on a copy of its own. Tokens
that a grammar forces are appended unasked and read together with the next one that the model has to choose.

Knows nothing of registries, prompts or the format of a step.
"""

import operator
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.forward import Runtime, RuntimeName
from loragen_agents.edge.grammar import GrammarMatcher, ToolGrammar
from loragen_agents.edge.kv_cache import History, PrefixStore, Snapshot, extended
from loragen_agents.edge.passes import Cache, Captured, Forward, Layout, RowUpdates
from loragen_agents.edge.sampling import Sampling, pick
from loragen_agents.edge.text_stream import TextStream
from loragen_agents.errors import PromptError

FinishReason = Literal["stop", "length", "cancelled"]

# Tokens read in one pass: bounds the memory that a long prompt takes, and the wait for a cancellation to be noticed.
_CHUNK = 512
# Slots to set aside for what is generated; more are added when they are needed.
_ROOM = 256
# Below this, a beginning that all prompts of a batch share is not worth a pass of its own.
_SHARED_HEAD = 32
# In 16-bit dtypes, and where products are quantised, the last bit of a token's keys and values depends on how many
# tokens a pass reads, and now and then a greedy answer depends on that bit. There, prompts are read in passes of this
# many tokens, and only the states of whole passes are used again: the same prompt gives the same answer whatever was
# read before. Longer passes would leave less to use again, shorter ones take longer to read.
_ALIGNED = 128
# Tokens scored in one pass: their logits over the whole vocabulary are held at once.
_SCORED = 256


@dataclass(frozen=True)
class Completion:
    """What was generated behind one prompt.

    text: without stop string, stop token and, for a tool call held to a grammar, the closing `Observation:`.
    token_ids: all generated tokens, those included. finish_reason: "stop" (a stop token or string, or the grammar's
    end), "length" or "cancelled". prompt_tokens: length of the prompt, of which cached_tokens were not read anew.
    first_token_seconds: until the first token was known; seconds: until the last.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt that was read: its tokens, their keys and values, and the logits (vocabulary,) of what comes next.

    Decode from it or score behind it as often as you like; nothing of it is read again.
    activations: inputs of `down_proj` at its last token in the layers that were asked for, with shape
        (layers, intermediate size), or None.
    history: the updates that its tokens were read with.
    """

    token_ids: tuple[int, ...]
    states: Snapshot
    logits: Tensor
    cached_tokens: int
    activations: Tensor | None = None
    history: History = ()


class CompletionStream:
    """Iterates over the pieces of a completion's text while it is generated. `completion` has the whole at the end."""

    def __init__(self, run: "_Run") -> None:
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


class Decoder:
    """Generates with one model. Safe for use by several threads, which share nothing but prefixes that were read.

    model: a causal LM with full or sliding attention, in evaluation mode; fastest after `forward.arrange_weights`.
    tokenizer: its tokenizer.
    stop_token_ids: tokens that end a completion; default: the model's and the tokenizer's end-of-sequence tokens.
    prefixes: how read prefixes are kept; default: 8 of them, 256 MiB in all.
    runtime: what runs the model; see `Runtime`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int] | None = None,
        prefixes: PrefixStore | None = None,
        runtime: RuntimeName = "auto",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset(_end_tokens(model, tokenizer) if stop_token_ids is None else stop_token_ids)
        self.prefixes = PrefixStore() if prefixes is None else prefixes
        self._runtime = Runtime(model, runtime)
        # Where the differences are too small to decide anything, every state can be used again.
        self._aligned = not self._runtime.exact
        self._state: list[Any] = []
        self._bound: Forward | None = None
        self._lock = threading.Lock()

    def stream(
        self,
        prompt: Sequence[int] | ReadPrompt,
        sampling: Sampling | None = None,
        grammar: ToolGrammar | None = None,
        cancel: threading.Event | None = None,
        updates: DownUpdates | None = None,
    ) -> CompletionStream:
        """Generate behind `prompt`, piece by piece. Nothing is computed before the first piece is asked for.

        cancel: set it, from any thread, to stop before the next token; what was generated until then is kept.
        updates: run beside the model's weights for all tokens that are read from here on; a `ReadPrompt` stays as it
            was read.

        Raises:
            PromptError: the prompt is empty, or too long for the model.
            GrammarError: (while the stream is read) see `ToolGrammar.matcher` and `GrammarMatcher.mask`.
        """
        return CompletionStream(_Run(self, [prompt], sampling or Sampling(), [grammar], cancel, [updates]))

    def generate(
        self,
        prompts: Sequence[Sequence[int] | ReadPrompt],
        sampling: Sampling | None = None,
        grammar: ToolGrammar | Sequence[ToolGrammar | None] | None = None,
        cancel: threading.Event | None = None,
        batch_size: int = 16,
        updates: DownUpdates | Sequence[DownUpdates | None] | None = None,
    ) -> list[Completion]:
        """Generate behind several prompts, up to `batch_size` of them at once, longest first; results in their order.

        grammar, updates: one for all prompts, or one for each.

        Raises:
            ValueError: another number of grammars or updates than of prompts. PromptError, GrammarError: as `stream`.
        """
        sampling = sampling or Sampling()
        grammars = [grammar] * len(prompts) if grammar is None or isinstance(grammar, ToolGrammar) else list(grammar)
        if len(grammars) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts can't be held to {len(grammars)} grammars; give one for each")
        own = [updates] * len(prompts) if updates is None or isinstance(updates, DownUpdates) else list(updates)
        if len(own) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts can't be run with {len(own)} updates; give one for each")
        order = sorted(range(len(prompts)), key=lambda place: -len(_tokens(prompts[place])))
        done: dict[int, Completion] = {}
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            run = _Run(
                self,
                [prompts[place] for place in places],
                sampling,
                [grammars[place] for place in places],
                cancel,
                [own[place] for place in places],
            )
            while run.step():
                pass
            run.end()
            done |= {place: row.completion() for place, row in zip(places, run.sequences, strict=True)}
        return [done[place] for place in range(len(prompts))]

    def read(
        self,
        prompt: Sequence[int],
        *,
        pin: bool = False,
        capture: Sequence[int] = (),
        updates: DownUpdates | None = None,
    ) -> ReadPrompt:
        """Read a prompt without generating.

        pin: keep its keys and values for good, as the beginning that many prompts will share; in 16-bit dtypes those
            of its whole passes of `_ALIGNED` tokens.
        capture: layers whose `activations` are wanted.
        updates: run beside the model's weights.

        Raises:
            PromptError: as `stream`.
            ModelLoadError: activations or updates are asked for, and the model has no gated FFN in each layer.
        """
        return self.read_parts([prompt], pin=pin, capture=capture, updates=updates)[0]

    @torch.inference_mode()
    def read_parts(
        self,
        parts: Sequence[Sequence[int]],
        *,
        behind: ReadPrompt | None = None,
        pin: bool = False,
        capture: Sequence[int] = (),
        updates: DownUpdates | None = None,
    ) -> list[ReadPrompt]:
        """Read tokens in one pass, and give what was read up to the end of each part, from the first part on.

        behind: a prompt that was read before and that the parts follow, with whatever updates it was read.
        pin, capture, updates, errors: as `read`.
        """
        before = () if behind is None else behind.token_ids
        ends = list(accumulate(map(len, parts), initial=len(before)))[1:]
        tokens = [*before, *chain.from_iterable(parts)]
        self._room(tokens[: ends[0]])
        self._room(tokens)
        forward = self._forward()
        history = extended(() if behind is None else behind.history, len(before), updates)
        layers = {*capture, *_layers([updates])}
        if behind is None:
            cache, (known,), (cached,) = self._opened(forward, [parts[0]], [history], ends[-1] - ends[0], layers=layers)
        else:
            cache, known, cached = forward.cache(1, len(tokens), layers), len(before), behind.cached_tokens
            cache.fill([behind.states], [known])
        # What is asked for stands in the last pass, whatever its width; before it, passes are bounded.
        early = known + (ends[0] - 1 - known) // _CHUNK * _CHUNK
        if early > known:
            _feed(forward, cache, [tokens[known:early]], self.model.device, [updates])
        device = self.model.device
        captured: Captured = dict.fromkeys(capture)
        keep = torch.tensor([[end - 1 - early for end in ends]], device=device)
        ids = torch.tensor([tokens[early:]], device=device)
        logits = forward(ids, cache, keep, captured=captured, updates=[updates])[0]
        cache.advance([len(tokens) - early])
        states = cache.snapshot(0)
        if not self._aligned:
            self.prefixes.add(tokens, states, pinned=pin, history=history)
        elif pin and behind is None and known:
            self.prefixes.add(tokens[:known], states.first(known).copy(), pinned=True, history=history)
        found = [activations[0] for activations in captured.values() if activations is not None]
        activations = torch.stack(found, dim=1) if found else None  # (parts, layers, intermediate size)
        return [
            ReadPrompt(
                tuple(tokens[:end]),
                states.first(end),
                logits[place],
                cached,
                None if activations is None else activations[place],
                history,
            )
            for place, end in enumerate(ends)
        ]

    @torch.inference_mode()
    def score(
        self,
        prompt: Sequence[int] | ReadPrompt,
        continuations: Sequence[Sequence[int]],
        *,
        updates: DownUpdates | None = None,
    ) -> list[float]:
        """Summed log-probabilities of several continuations behind one prompt, read as one batch.

        The prompt is read once. The continuations follow it in a single row, each blind to the others.
        updates: as `stream`.

        Raises:
            PromptError: as `stream`.
        """
        read = prompt if isinstance(prompt, ReadPrompt) else self.read(prompt, updates=updates)
        forward = self._forward()
        device = self.model.device
        scores = [0.0] * len(continuations)
        first = torch.log_softmax(read.logits.float(), dim=-1)
        for place, tokens in enumerate(continuations):
            if tokens:
                scores[place] = first[tokens[0]].item()
        prefix = len(read.token_ids)
        cache = forward.cache(1, prefix + max(map(len, continuations), default=0), _layers([updates]))
        cache.fill([read.states], [prefix])
        for group in _groups([len(tokens) - 1 for tokens in continuations], _SCORED):
            fed = [token for place in group for token in continuations[place][:-1]]
            targets = [token for place in group for token in continuations[place][1:]]
            lengths = [len(continuations[place]) - 1 for place in group]
            layout = _side_by_side(prefix, lengths, device)
            keep = torch.arange(len(fed), device=device)[None]
            ids = torch.tensor([fed], device=device)
            logits = forward(ids, cache, keep, layout, updates=[updates])[0]
            chosen = torch.log_softmax(logits.float(), dim=-1)[keep[0], torch.tensor(targets, device=device)]
            for place, part in zip(group, chosen.split(lengths), strict=True):
                scores[place] += part.sum().item()
        return scores

    def _forward(self) -> Forward:
        """How the model is run now. Prefixes that it read with other weights are forgotten."""
        state = self._runtime.state()
        with self._lock:
            same = len(state) == len(self._state) and all(map(operator.is_, state, self._state))
            if self._bound is None or not same:
                self.prefixes.clear()
                self._state, self._bound = state, self._runtime.bind()
            return self._bound

    def _room(self, prompt: Sequence[int] | ReadPrompt) -> int:
        """Number of tokens that can follow a prompt.

        Raises:
            PromptError: the prompt is empty, or too long for the model.
        """
        length = len(_tokens(prompt))
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
        if length == 0:
            raise PromptError("the prompt has no tokens; expected at least one")
        if length >= limit:
            raise PromptError(
                f"the prompt has {length} tokens, and {type(self.model).__name__} has room for {limit} with the "
                "answer; shorten the conversation or its observations"
            )
        return limit - length

    def _opened(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int] | ReadPrompt],
        histories: Sequence[History],
        room: int,
        forced: Sequence[Sequence[int]] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        layers: Collection[int] = (),
    ) -> tuple[Cache, list[int], list[int]]:
        """A cache with one row for each prompt, begun with what is known of it.

        Also returned: how many tokens that is for each row, and how many of them were known before.
        At least the last token of a prompt is left to be read, except where the prompt was read as a whole.
        histories: how each row is to have been read at the end. layers: as `Forward.cache`.
        forced: tokens that follow each prompt in any case; of these, too, some may be known.
        """
        plain = [place for place, prompt in enumerate(prompts) if not isinstance(prompt, ReadPrompt)]
        head, shared = None, 0
        # What is read with updates of its own is shared with no other row.
        if len(plain) > 1 and not self._aligned and all(histories[place] == histories[plain[0]] for place in plain):
            head, shared = self._shared_head(forward, [list(_tokens(prompts[p])) for p in plain], histories[plain[0]])
        states: list[Snapshot | None] = []
        lengths: list[int] = []
        cached: list[int] = []
        for prompt, history, behind in zip(prompts, histories, forced or [()] * len(prompts), strict=True):
            known: tuple[Snapshot | None, int] = head, shared
            kept: int | None = None
            if isinstance(prompt, ReadPrompt):
                known = prompt.states, len(prompt.token_ids)
            elif self._aligned:
                known, kept = self._whole_passes(forward, prompt, history, cancelled)
            if not self._aligned and (behind or not isinstance(prompt, ReadPrompt)):
                found = self.prefixes.find([*_tokens(prompt), *behind][:-1], history)
                known = found if found[1] > known[1] else known
            states.append(known[0])
            lengths.append(known[1])
            cached.append(known[1] if kept is None else kept)
        cache = forward.cache(len(prompts), max([*map(len, map(_tokens, prompts)), *lengths]) + room, layers)
        cache.fill(states, lengths)
        return cache, lengths, cached

    def _whole_passes(
        self, forward: Forward, prompt: Sequence[int], history: History, cancelled: Callable[[], bool]
    ) -> tuple[tuple[Snapshot | None, int], int]:
        """The states of a prompt's whole passes of `_ALIGNED` tokens, how many tokens that is, and how many were kept.

        What is missing is read. At least the last token is left.
        """
        states, known = self.prefixes.find(prompt[:-1], history)
        known -= known % _ALIGNED
        cached = known
        whole = (len(prompt) - 1) // _ALIGNED * _ALIGNED
        if known < whole:
            updates = history[0][1] if history else None
            cache = forward.cache(1, whole, _layers([updates]))
            cache.fill([states], [known])
            _feed(forward, cache, [prompt[known:whole]], self.model.device, [updates], cancelled, _ALIGNED)
            (known,) = cache.lengths
            states = cache.snapshot(0)
            self.prefixes.add(prompt[:known], states, history=history)
        return (states, known), cached

    def _shared_head(self, forward: Forward, prompts: list[list[int]], history: History) -> tuple[Snapshot | None, int]:
        """What all prompts begin with, read once for all of them, and its length; 0 where it is known or too short."""
        first, last = min(prompts), max(prompts)
        shared = min(map(len, prompts)) - 1
        head = first[: next((at for at in range(shared) if first[at] != last[at]), shared)]
        _, known = self.prefixes.find(head, history)
        if len(head) - known < _SHARED_HEAD:
            return None, 0
        # Plain prompts are read with the same updates from their first token on.
        updates = history[0][1] if history else None
        cache, (cached,), _ = self._opened(forward, [head], [history], room=0, layers=_layers([updates]))
        _feed(forward, cache, [head[cached:]], self.model.device, [updates])
        states = cache.snapshot(0)
        self.prefixes.add(head, states, history=history)
        return states, len(head)


class _Sequence:
    """One sequence of a run: what was generated for it, and what its next token may be."""

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int] | ReadPrompt,
        sampling: Sampling,
        grammar: ToolGrammar | None,
        updates: DownUpdates | None,
    ) -> None:
        self.prompt = prompt
        self.updates = updates
        self.history = (
            extended(prompt.history, len(prompt.token_ids), updates)
            if isinstance(prompt, ReadPrompt)
            else extended((), 0, updates)
        )
        self.limit = min(sampling.max_tokens, decoder._room(prompt))
        self.sampling = sampling
        self.grammar = grammar
        self.matcher: GrammarMatcher | None = None
        closing = () if grammar is None else (grammar.closing,)
        self.text = TextStream(decoder.tokenizer, _tokens(prompt), sampling.stop, closing)
        self.stop_token_ids = decoder.stop_token_ids
        self.generator: torch.Generator | None = None
        self.tokens: list[int] = []
        # Tokens that the model has not read yet.
        self.pending: list[int] = []
        self.reason: FinishReason | None = None
        self.cached = 0
        self.first_seconds: float | None = None
        self.seconds = 0.0

    def prepare(self, decoder: Decoder) -> None:
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
        prompt = _tokens(self.prompt)
        self.cached = min(cached, len(prompt))
        self.pending = [*prompt, *self.tokens][known:]

    def choose(self, logits: Tensor) -> None:
        """Take the next token by logits of shape (vocabulary,), and all that the grammar then forces."""
        scores = logits.to(torch.float32, copy=True)
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
            prompt_tokens=len(_tokens(self.prompt)),
            cached_tokens=self.cached,
            first_token_seconds=self.seconds if self.first_seconds is None else self.first_seconds,
            seconds=self.seconds,
        )


class _Run:
    """Several sequences generated together, one row of a cache for each that is not finished."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int] | ReadPrompt],
        sampling: Sampling,
        grammars: Sequence[ToolGrammar | None],
        cancel: threading.Event | None,
        updates: RowUpdates,
    ) -> None:
        self._decoder = decoder
        self._cancel = cancel
        self.sequences = [
            _Sequence(decoder, prompt, sampling, grammar, own)
            for prompt, grammar, own in zip(prompts, grammars, updates, strict=True)
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
        logits = _feed(self._forward, self._cache, pending, device, updates, self._cancelled)
        for row, scores in zip(self._rows, logits, strict=True):
            if scores is None and isinstance(row.prompt, ReadPrompt) and not row.pending:
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
            read = [*_tokens(only.prompt), *only.tokens][: self._cache.lengths[0]]
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
        layers = _layers([sequence.updates for sequence in self.sequences])
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


def _feed(
    forward: Forward,
    cache: Cache,
    tokens: Sequence[Sequence[int]],
    device: torch.device,
    updates: RowUpdates,
    cancelled: Callable[[], bool] = lambda: False,
    width: int | None = None,
) -> list[Tensor | None]:
    """Feed each row its tokens, at most `width` a pass; return the logits (vocabulary,) behind each row's last.

    None for a row without tokens, and for those whose last token was not reached before `cancelled`.
    """
    width = width or _CHUNK
    logits: list[Tensor | None] = [None] * len(tokens)
    for begin in range(0, max(map(len, tokens)), width):
        if begin and cancelled():
            break
        parts = [row[begin : begin + width] for row in tokens]
        counts = [len(part) for part in parts]
        longest = max(counts)
        ids = torch.tensor([[*part, *[0] * (longest - len(part))] for part in parts], device=device)
        keep = torch.tensor([[max(0, count - 1)] for count in counts], device=device)
        result = forward(ids, cache, keep, updates=updates)
        cache.advance(counts)
        for row, count in enumerate(counts):
            if count and begin + count == len(tokens[row]):
                logits[row] = result[row, 0]
    return logits


def _layers(updates: RowUpdates) -> set[int]:
    """The layers that any of the updates change."""
    return {layer for one in updates if one is not None for layer in one.tensors}


def _tokens(prompt: Sequence[int] | ReadPrompt) -> Sequence[int]:
    return prompt.token_ids if isinstance(prompt, ReadPrompt) else prompt


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        ends.update([] if found is None else [found] if isinstance(found, int) else found)
    return ends


def _groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of the positive lengths in order, grouped so that a group of several sums up to at most `most`."""
    group: list[int] = []
    total = 0
    for place, length in enumerate(lengths):
        if length <= 0:
            continue
        if group and total + length > most:
            yield group
            group, total = [], 0
        group.append(place)
        total += length
    if group:
        yield group


def _side_by_side(prefix: int, lengths: Sequence[int], device: torch.device) -> Layout:
    """Continuations of these lengths one after another in a row behind `prefix` slots, none of which sees another."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own_place = torch.cat([torch.arange(length) for length in lengths])
    ours = (owner[:, None] == owner) & (own_place[:, None] >= own_place)
    visible = torch.cat((torch.ones(len(owner), prefix, dtype=torch.bool), ours), dim=1)
    positions = prefix + own_place
    slots = torch.cat((torch.arange(prefix), positions))
    return Layout(positions[None].to(device), visible[None].to(device), slots[None].to(device))
