"""Decoding: prompts to text, one token after another, streamed or in batches, free or held to a grammar.

A `Decoder` belongs to one model. It keeps the keys and values of prefixes that it has read, so that the next step of an
agent, whose prompt begins with the last one, reads only what is new; every request works on a copy of its own. Tokens
that a grammar forces are appended unasked and read together with the next one that the model has to choose.

Knows nothing of registries, prompts or the format of a step.
"""

import operator
import threading
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge import feeding
from loragen_agents.edge.completion import Completion, PrefilledPrompt, prompt_tokens
from loragen_agents.edge.feeding import feed, in_groups, side_by_side, updated_layers
from loragen_agents.edge.forward import Runtime
from loragen_agents.edge.grammar import ToolGrammar
from loragen_agents.edge.guides import Guided
from loragen_agents.edge.kv_cache import History, PrefixStore, Snapshot, extended
from loragen_agents.edge.passes import Cache, Captured, Forward
from loragen_agents.edge.run import CompletionStream, Run
from loragen_agents.edge.sampling import Sampling
from loragen_agents.errors import PromptError
from loragen_agents.models.runtimes import RuntimeName

# Below this, a beginning that all prompts of a batch share is not worth a pass of its own.
_SHARED_HEAD = 32
# In 16-bit dtypes, and where products are quantised, the last bit of a token's keys and values depends on how many
# tokens a pass reads, and now and then a greedy answer depends on that bit. There, prompts are read in passes of this
# many tokens, and only the states of whole passes are used again: the same prompt gives the same answer whatever was
# read before. Longer passes would leave less to use again, shorter ones take longer to read.
_ALIGNED = 128
# Tokens scored in one pass: their logits over the whole vocabulary are held at once.
_SCORED = 256


class Decoder:
    """Generates with one model. Safe for use by several threads, which share nothing but prefixes that were read.

    Args:
        model: a causal LM with full or sliding attention, in evaluation mode; fastest after `forward.arrange_weights`.
        tokenizer: its tokenizer.
        stop_token_ids: tokens that end a completion; default: the model's and the tokenizer's end-of-sequence tokens.
        prefixes: how read prefixes are kept; default: 8 of them, 256 MiB in all.
        runtime: what runs the model; see `Runtime`.
        merged: weights to merge into the model, which itself stays as it is.
        fingerprint: of the model's tensors, if it is known.

    Attributes:
        model: with the weights merged where PyTorch runs it; as it was given where a compiled graph holds them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int] | None = None,
        prefixes: PrefixStore | None = None,
        runtime: RuntimeName = "auto",
        merged: LoRAWeights | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset(_end_tokens(model, tokenizer) if stop_token_ids is None else stop_token_ids)
        self.prefixes = PrefixStore() if prefixes is None else prefixes
        self._runtime = Runtime(model, runtime, merged, fingerprint)
        # Where the differences are too small to decide anything, every state can be used again.
        self._aligned = not self._runtime.exact
        self._state: list[Any] = []
        self._bound: Forward | None = None
        self._lock = threading.Lock()

    @property
    def model(self) -> PreTrainedModel:
        return self._runtime.model

    @property
    def runtime(self) -> Literal["openvino", "torch"]:
        """What runs the model as it is now."""
        return self._runtime.name

    def stream(
        self,
        prompt: Sequence[int] | PrefilledPrompt,
        sampling: Sampling | None = None,
        grammar: ToolGrammar | None = None,
        cancel: threading.Event | None = None,
        updates: DownUpdates | None = None,
        guided: Guided | None = None,
    ) -> CompletionStream:
        """Generate behind `prompt`, piece by piece. Nothing is computed before the first piece is asked for.

        Args:
            cancel: set it, from any thread, to stop before the next token; what was generated until then is kept.
            updates: run beside the model's weights for all tokens that are read from here on; a `PrefilledPrompt`
                stays as it is.
            guided: adds to the logits of each token, before the grammar.

        Raises:
            PromptError: the prompt is empty, or too long for the model.
            GrammarError: (while the stream is read) see `ToolGrammar.matcher` and `GrammarMatcher.mask`.
        """
        return CompletionStream(Run(self, [prompt], sampling or Sampling(), [grammar], cancel, [updates], [guided]))

    def generate(
        self,
        prompts: Sequence[Sequence[int] | PrefilledPrompt],
        sampling: Sampling | None = None,
        grammar: ToolGrammar | Sequence[ToolGrammar | None] | None = None,
        cancel: threading.Event | None = None,
        batch_size: int = 16,
        updates: DownUpdates | Sequence[DownUpdates | None] | None = None,
        guided: Sequence[Guided | None] | None = None,
    ) -> list[Completion]:
        """Generate behind several prompts, up to `batch_size` of them at once, longest first; results in their order.

        Args:
            grammar, updates: one for all prompts, or one for each.
            guided: as `stream`, one for each prompt.

        Raises:
            ValueError: another number of grammars, updates or guides than of prompts.
            PromptError, GrammarError: as `stream`.
        """
        sampling = sampling or Sampling()
        grammars = [grammar] * len(prompts) if grammar is None or isinstance(grammar, ToolGrammar) else list(grammar)
        if len(grammars) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts can't be held to {len(grammars)} grammars; give one for each")
        own = [updates] * len(prompts) if updates is None or isinstance(updates, DownUpdates) else list(updates)
        if len(own) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts can't be run with {len(own)} updates; give one for each")
        by = [None] * len(prompts) if guided is None else list(guided)
        if len(by) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts can't be guided by {len(by)} guides; give one for each")
        order = sorted(range(len(prompts)), key=lambda place: -len(prompt_tokens(prompts[place])))
        done: dict[int, Completion] = {}
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            run = Run(
                self,
                [prompts[place] for place in places],
                sampling,
                [grammars[place] for place in places],
                cancel,
                [own[place] for place in places],
                [by[place] for place in places],
            )
            while run.step():
                pass
            run.end()
            done |= {place: row.completion() for place, row in zip(places, run.sequences, strict=True)}
        return [done[place] for place in range(len(prompts))]

    def prefill(
        self,
        prompt: Sequence[int],
        *,
        pin: bool = False,
        capture: Sequence[int] = (),
        updates: DownUpdates | None = None,
    ) -> PrefilledPrompt:
        """Read a prompt without generating.

        Args:
            pin: keep its keys and values for good, as the beginning that many prompts will share; in 16-bit dtypes
                those of its whole passes of `_ALIGNED` tokens.
            capture: layers whose `activations` are wanted.
            updates: run beside the model's weights.

        Raises:
            PromptError: as `stream`.
            ModelLoadError: activations or updates are asked for, and the model has no gated FFN in each layer.
        """
        return self.prefill_parts([prompt], pin=pin, capture=capture, updates=updates)[0]

    @torch.inference_mode()
    def prefill_parts(
        self,
        parts: Sequence[Sequence[int]],
        *,
        behind: PrefilledPrompt | None = None,
        pin: bool = False,
        capture: Sequence[int] = (),
        updates: DownUpdates | None = None,
    ) -> list[PrefilledPrompt]:
        """Prefill several parts in one pass, and give what was read up to the end of each, from the first on.

        Args:
            behind: a prompt that was read before and that the parts follow, with whatever updates it was read.
            pin, capture, updates: as `read`.

        Raises:
            PromptError, ModelLoadError: as `read`.
        """
        before = () if behind is None else behind.token_ids
        ends = list(accumulate(map(len, parts), initial=len(before)))[1:]
        tokens = [*before, *chain.from_iterable(parts)]
        self._room(tokens[: ends[0]])
        self._room(tokens)
        forward = self._forward()
        history = extended(() if behind is None else behind.history, len(before), updates)
        layers = {*capture, *updated_layers([updates])}
        if behind is None:
            cache, (known,), (cached,) = self._opened(forward, [parts[0]], [history], ends[-1] - ends[0], layers=layers)
        else:
            cache, known, cached = forward.cache(1, len(tokens), layers), len(before), behind.cached_tokens
            cache.fill([behind.states], [known])
        # What is asked for stands in the last pass, whatever its width; before it, passes are bounded.
        early = known + (ends[0] - 1 - known) // feeding.CHUNK * feeding.CHUNK
        if early > known:
            feed(forward, cache, [tokens[known:early]], self.model.device, [updates])
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
            PrefilledPrompt(
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
        prompt: Sequence[int] | PrefilledPrompt,
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
        read = prompt if isinstance(prompt, PrefilledPrompt) else self.prefill(prompt, updates=updates)
        forward = self._forward()
        device = self.model.device
        scores = [0.0] * len(continuations)
        first = torch.log_softmax(read.logits.float(), dim=-1)
        for place, tokens in enumerate(continuations):
            if tokens:
                scores[place] = first[tokens[0]].item()
        prefix = len(read.token_ids)
        cache = forward.cache(1, prefix + max(map(len, continuations), default=0), updated_layers([updates]))
        cache.fill([read.states], [prefix])
        for group in in_groups([len(tokens) - 1 for tokens in continuations], _SCORED):
            fed = [token for place in group for token in continuations[place][:-1]]
            targets = [token for place in group for token in continuations[place][1:]]
            lengths = [len(continuations[place]) - 1 for place in group]
            layout = side_by_side(prefix, lengths, device)
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

    def _room(self, prompt: Sequence[int] | PrefilledPrompt) -> int:
        """Number of tokens that can follow a prompt.

        Raises:
            PromptError: the prompt is empty, or too long for the model.
        """
        length = len(prompt_tokens(prompt))
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
        prompts: Sequence[Sequence[int] | PrefilledPrompt],
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
        plain = [place for place, prompt in enumerate(prompts) if not isinstance(prompt, PrefilledPrompt)]
        head, shared = None, 0
        # What is read with updates of its own is shared with no other row.
        if len(plain) > 1 and not self._aligned and all(histories[place] == histories[plain[0]] for place in plain):
            head, shared = self._shared_head(
                forward, [list(prompt_tokens(prompts[p])) for p in plain], histories[plain[0]]
            )
        states: list[Snapshot | None] = []
        lengths: list[int] = []
        cached: list[int] = []
        for prompt, history, behind in zip(prompts, histories, forced or [()] * len(prompts), strict=True):
            known: tuple[Snapshot | None, int] = head, shared
            kept: int | None = None
            if isinstance(prompt, PrefilledPrompt):
                known = prompt.states, len(prompt.token_ids)
            elif self._aligned:
                known, kept = self._whole_passes(forward, prompt, history, cancelled)
            if not self._aligned and (behind or not isinstance(prompt, PrefilledPrompt)):
                found = self.prefixes.find([*prompt_tokens(prompt), *behind][:-1], history)
                known = found if found[1] > known[1] else known
            states.append(known[0])
            lengths.append(known[1])
            cached.append(known[1] if kept is None else kept)
        cache = forward.cache(len(prompts), max([*map(len, map(prompt_tokens, prompts)), *lengths]) + room, layers)
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
            cache = forward.cache(1, whole, updated_layers([updates]))
            cache.fill([states], [known])
            feed(forward, cache, [prompt[known:whole]], self.model.device, [updates], cancelled, _ALIGNED)
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
        cache, (cached,), _ = self._opened(forward, [head], [history], room=0, layers=updated_layers([updates]))
        feed(forward, cache, [head[cached:]], self.model.device, [updates])
        states = cache.snapshot(0)
        self.prefixes.add(head, states, history=history)
        return states, len(head)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        found = getattr(source, "eos_token_id", None)
        ends.update([] if found is None else [found] if isinstance(found, int) else found)
    return ends
