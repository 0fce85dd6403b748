"""The specialised edge LM: one registry's weights on an edge LM, decoding at bare speed.

Of the edge LM only the FFN matrices that merged weights change exist a second time; every other tensor is shared with
it and with all its other specialisations. Where a registry has keys, the merged weights are those that carry format and
task, which registries may share; the keys choose the tool, and the tool's own updates run beside the model while its
call is written. So registries never see each other, in whatever threads they are served. Where the weights come from,
and LangChain, are not this module's business.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import cast

from transformers import PreTrainedTokenizerFast

from loragen_agents.adapter.argument_reader import ArgumentKeys, side_by_side
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import OBSERVATION_STOP
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.copying import CopiedValues, copied_types, copied_values
from loragen_agents.edge.decoding import Completion, CompletionStream, Decoder, PrefilledPrompt
from loragen_agents.edge.excuses import Excuses, reported
from loragen_agents.edge.grammar import ToolChoice, ToolGrammar
from loragen_agents.edge.guides import Guided
from loragen_agents.edge.held_arguments import can_be_held, held_arguments, narrowed
from loragen_agents.edge.request_parts import RequestParts
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.tool_choice import KeyScorer, NameScorer, ToolProbabilities, ToolScorer
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.models.runtimes import RuntimeName, chosen_runtime
from loragen_agents.registry import ToolRegistry


def merged_decoder(edge: LanguageModel, weights: LoRAWeights | None, *, for_one: bool = False) -> Decoder:
    """A decoder of a copy of `edge` with the weights merged; tensors that they don't change are shared with `edge`.

    Args:
        for_one: the weights are those of one registry. Compiling such a model takes longer than writing most of what
            is asked of it, so PyTorch runs it, unless another runtime was chosen by name.

    Raises:
        ValueError: the weights are for another model.
        ModelLoadError: the edge LM can't be cloned or decoded.
    """
    runtime: RuntimeName = "torch" if for_one and chosen_runtime() == "auto" else "auto"
    model = clone_sharing_tensors(edge.model)
    decoder = Decoder(model, edge.tokenizer, runtime=runtime, merged=weights, fingerprint=edge.fingerprint)
    # A model's own end-of-sequence tokens are not always those that its chat template closes a turn with.
    decoder.stop_token_ids |= frozenset(shared_renderer(edge.tokenizer).end_token_ids)
    return decoder


# Grammars of calls held to some of their arguments; each takes a millisecond or two to make.
_HELD_GRAMMARS = 256
# An answer is free text, and a small model may write on with the next lines of a step, as training shows them.
_BEHIND_ANSWER = (OBSERVATION_STOP, "\nThought:", "\nHuman:")


class SpecializedLM:
    """An edge LM + the weights of a registry + its grammar. Safe to use from several threads.

    `decoder` and `renderer` are there for those who need more than a step.

    Args:
        edge: the base; it is left as it is.
        weights: None gives the bare edge LM. LoRA weights are merged, and names are scored. Of the parts of a
            registry's weights, those with keys, the shared ones are merged.
        registry: whose steps are decoded.
        decoder: of `edge` with these (shared) weights merged, as `merged_decoder` gives it; made here if left out.

    Raises:
        ValueError: the weights are for another model.
        ModelLoadError: the edge LM can't be cloned or decoded.
        PromptError: its tokenizer's chat template can't be followed.
    """

    def __init__(
        self,
        edge: LanguageModel,
        weights: LoRAWeights | RegistryWeights | None,
        registry: ToolRegistry,
        decoder: Decoder | None = None,
    ) -> None:
        self.edge, self.registry = edge, registry
        self.renderer = shared_renderer(edge.tokenizer)
        # The renderer has refused tokenizers of any other kind.
        self._fast_tokenizer = cast(PreTrainedTokenizerFast, edge.tokenizer)
        self._parts: RegistryWeights | None = None
        self._request_parts: RequestParts | None = None
        merged: LoRAWeights | None
        if isinstance(weights, RegistryWeights):
            self._parts = weights if weights.keys is not None else None
            merged = weights.shared if weights.keys is not None else weights.combined()
        else:
            merged = weights
        self.decoder = decoder or merged_decoder(edge, merged, for_one=self._parts is None and merged is not None)
        self.scorer: ToolScorer
        if self._parts is not None and self._parts.keys is not None:
            self.scorer = KeyScorer(self.decoder, self.renderer, registry, self._parts.keys)
            self._request_parts = RequestParts(self.scorer, self.renderer)
        else:
            self.scorer = NameScorer(self.decoder, self.renderer, registry)
        self._grammars: dict[ToolChoice, ToolGrammar] = {}
        # Of the registry alone, not of this object, which is to be freed with its last user.
        self._held = lru_cache(_HELD_GRAMMARS)(partial(_held_grammar, registry, self._fast_tokenizer))
        self._alone: SpecializedLM | None = None
        self._lock = threading.Lock()

    @property
    def alone(self) -> "SpecializedLM":
        """The same registry by its weights alone: their sum merged, names scored; itself where there are no keys."""
        if self._parts is None:
            return self
        with self._lock:
            if self._alone is None:
                self._alone = SpecializedLM(self.edge, self._parts.combined(), self.registry)
            return self._alone

    def stream(
        self,
        turns: Sequence[Turn],
        sampling: Sampling | None = None,
        *,
        grammar: bool = True,
        tool_choice: ToolChoice = "auto",
        score_tools: bool = True,
        cancel: threading.Event | None = None,
    ) -> "StepCompletionStream":
        """Decode the next step of a conversation, piece by piece: what follows `THOUGHT_QUESTION`.

        A step ends behind a tool call (`Observation:` is not part of it), or with the answer.

        Args:
            grammar: hold the step to the registry's names and schemas; without it, text is free, `tool_choice` unused,
                and the weights alone carry the registry (see `alone`).
            score_tools: where the model has to choose among tools, under the grammar, score all of them (see
                `ToolScorer`) instead of spelling a name; the stream's `tools` has the probabilities. Names are scored
                for greedy decoding alone. Without it, the weights alone carry the registry.

        Raises:
            PromptError: the conversation is no prompt, or too long for the model.
            GrammarError: the registry or the tool choice can't be turned into a grammar.
        """
        if self._parts is not None and not (grammar and score_tools):
            return self.alone.stream(
                turns, sampling, grammar=grammar, tool_choice=tool_choice, score_tools=False, cancel=cancel
            )
        sampling = self._sampling(sampling, grammar)
        if not grammar:
            return StepCompletionStream(self.decoder.stream(self.renderer.user_turn(turns), sampling, None, cancel))
        if not (score_tools and self._has_choice(sampling, tool_choice, cancel)):
            scored = self._unscored(self.renderer.user_turn(turns), turns, tool_choice, cancel)
        else:
            scored = self.score(turns, tool_choice)
        if scored.grammar is self.grammar("none"):
            sampling = replace(sampling, stop=(*sampling.stop, *_BEHIND_ANSWER))
        stream = self.decoder.stream(scored.read, sampling, scored.grammar, cancel, scored.updates, scored.guided)
        return StepCompletionStream(stream, scored)

    def due(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The conversation as the next step reads it: of a request for several things, the one that is due.

        Where tools are chosen by keys; see `RequestParts`. Otherwise it stays as it is.
        """
        return turns if self._request_parts is None else self._request_parts.due(turns)

    def _has_choice(self, sampling: Sampling, tool_choice: ToolChoice, cancel: threading.Event | None) -> bool:
        # Nothing is scored for a caller who has gone; decoding then ends before its first token.
        if cancel is not None and cancel.is_set():
            return False
        if tool_choice not in ("auto", "any"):
            return False
        if self._parts is not None:
            return True
        return sampling.temperature == 0 and len(self.registry) > 1

    def _unscored(
        self, prompt: Sequence[int], turns: Sequence[Turn], tool_choice: ToolChoice, cancel: threading.Event | None
    ) -> "ScoredPrompt":
        """As `score`, where no tool has to be chosen: the prompt is read only if that tells more."""
        cancelled = cancel is not None and cancel.is_set()
        if cancelled or tool_choice not in self.registry or self._argument_keys(tool_choice) is None:
            guided = self._excuses if tool_choice == "none" and reported(turns) else None
            return ScoredPrompt(prompt, self.grammar(tool_choice), self._updates(tool_choice), None, 0.0, guided)
        started = time.perf_counter()
        read = self.decoder.prefill(prompt)
        grammar, copied = self._call(tool_choice, turns, read)
        seconds = time.perf_counter() - started
        return ScoredPrompt(read, grammar, self._updates(tool_choice), None, seconds, copied)

    @cached_property
    def _excuses(self) -> Excuses:
        return Excuses(self.renderer, self._fast_tokenizer)

    def _argument_keys(self, tool: str) -> ArgumentKeys | None:
        """What tells which arguments a request gives and where; None where the model alone decides."""
        # In csv inputs an argument is told by its place, so none can be left out before another.
        if self._parts is None or self.registry.input_format == "csv":
            return None
        known = self.registry[tool]
        return self._parts.arguments(tool) if can_be_held(known) or copied_types(known) else None

    def _call(self, tool: str, turns: Sequence[Turn], read: PrefilledPrompt) -> tuple[ToolGrammar, CopiedValues | None]:
        """The grammar of a call of one tool, held to the arguments that the conversation gives, and their values."""
        keys = self._argument_keys(tool)
        if keys is None:
            return self.grammar(tool), None
        found = keys.find(side_by_side(read.states.values(keys.reader.layers)))
        known = self.registry[tool]
        holds = can_be_held(known)
        grammar = self._held(tool, *held_arguments(known, found.given)) if holds else self.grammar(tool)
        return grammar, copied_values(known, turns, self.renderer, self._fast_tokenizer, found)

    def _updates(self, tool: str | None) -> DownUpdates | None:
        if self._parts is None or tool is None or tool not in self.registry:
            return None
        return self._parts.updates(tool)

    def score(
        self,
        turns: Sequence[Turn],
        tool_choice: ToolChoice = "auto",
        *,
        prompt: Sequence[int] | None = None,
        scorer: ToolScorer | None = None,
    ) -> "ScoredPrompt":
        """Read a conversation, score the tools behind it, and hold what follows to the one that was chosen.

        Args:
            turns: the conversation; of a request for several things, what is due is read (see `RequestParts`).
            tool_choice: "auto" or "any".
            prompt: in place of the conversation's own, which then is read as it is; ends in `THOUGHT_QUESTION`.
            scorer: in place of the model's own.
        """
        started = time.perf_counter()
        scorer = scorer or self.scorer
        if prompt is None:
            turns = self.due(turns)
            prompt = self.renderer.user_turn(turns)
        request = scorer.prefill(prompt)
        tools = scorer(request)
        chosen = tools.best if tool_choice == "any" else tools.chosen
        guided: Guided | None
        if chosen is None:
            grammar, guided, updates = self.grammar("none"), self._excuses if reported(turns) else None, None
        else:
            grammar, guided = self._call(chosen, turns, request.prompt)
            updates = self._updates(chosen)
        return ScoredPrompt(request.prompt, grammar, updates, tools, time.perf_counter() - started, guided)

    def grammar(self, tool_choice: ToolChoice = "auto") -> ToolGrammar:
        """The registry's grammar for a tool choice, made when it is first asked for.

        Raises:
            GrammarError: see `ToolGrammar`.
        """
        with self._lock:
            if tool_choice not in self._grammars:
                self._grammars[tool_choice] = ToolGrammar(self.registry, self._fast_tokenizer, tool_choice)
            return self._grammars[tool_choice]

    @staticmethod
    def _sampling(sampling: Sampling | None, grammar: bool) -> Sampling:
        sampling = sampling or Sampling()
        # The grammar ends a call by itself; free text has to be cut before the model invents the tool's report.
        return sampling if grammar else replace(sampling, stop=(*sampling.stop, OBSERVATION_STOP))


def _held_grammar(
    registry: ToolRegistry,
    tokenizer: PreTrainedTokenizerFast,
    tool: str,
    demanded: frozenset[str],
    refused: frozenset[str],
) -> ToolGrammar:
    """The grammar of a call of one tool, with these arguments and without those."""
    held = narrowed(registry[tool], demanded, refused)
    return ToolGrammar(ToolRegistry([held], input_format=registry.input_format), tokenizer, tool)


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt whose tool is chosen, and that was read where this took reading.

    Attributes:
        updates: what runs beside the model while the step is written.
        tools: None where no tool had to be chosen.
        seconds: what reading and choosing took.
        guided: what the request has of the call's values; behind a report, what makes excuses less likely.
    """

    read: Sequence[int] | PrefilledPrompt
    grammar: ToolGrammar
    updates: DownUpdates | None
    tools: ToolProbabilities | None
    seconds: float
    guided: Guided | None = None

    def completed(self, completion: Completion) -> Completion:
        """The completion with the reading and choosing counted in."""
        if not isinstance(self.read, PrefilledPrompt):
            return completion
        return replace(
            completion,
            cached_tokens=self.read.cached_tokens,
            first_token_seconds=self.seconds + completion.first_token_seconds,
            seconds=self.seconds + completion.seconds,
        )


class StepCompletionStream(CompletionStream):
    """A step while it is generated.

    Attributes:
        tools: where the tool was chosen by scoring all of them, the probabilities that it was chosen by, else None.
    """

    def __init__(self, stream: CompletionStream, scored: ScoredPrompt | None = None) -> None:
        super().__init__(stream._run)
        self._scored = scored
        self.tools = scored.tools if scored is not None else None

    @property
    def completion(self) -> Completion:
        whole = super().completion
        return whole if self._scored is None else self._scored.completed(whole)
