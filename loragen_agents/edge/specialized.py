"""The specialised edge LM: one registry's LoRA weights merged into a module tree of their own, decoding at bare speed.

Of the edge LM only the FFN matrices that the weights change exist a second time; every other tensor is shared with it
and with all its other specialisations. So registries never see each other, in whatever threads they are served. Where
the weights come from, and LangChain, are not this module's business.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedTokenizerFast

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import OBSERVATION_STOP
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.decoding import Completion, CompletionStream, Decoder, ReadPrompt
from loragen_agents.edge.grammar import ToolChoice, ToolGrammar
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.tool_choice import ToolProbabilities, ToolScorer
from loragen_agents.models.arrangement import arrange_weights
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import ToolRegistry


class SpecializedLM:
    """An edge LM + LoRA weights + the grammar of a registry. Safe to use from several threads.

    edge: the base; it is left as it is. weights: None gives the bare edge LM. registry: whose steps are decoded.
    match: what requests are matched with by state, where tools are scored; of the same specialisation.
    `model`, `decoder` and `renderer` are there for those who need more than a step.

    Raises:
        ValueError: the weights are for another model.
        ModelLoadError: the edge LM can't be cloned or decoded.
        PromptError: its tokenizer's chat template can't be followed.
    """

    def __init__(
        self,
        edge: LanguageModel,
        weights: LoRAWeights | None,
        registry: ToolRegistry,
        match: ToolMatch | None = None,
    ) -> None:
        self.edge, self.weights, self.registry, self.match = edge, weights, registry, match
        self.renderer = shared_renderer(edge.tokenizer)
        self.model = clone_sharing_tensors(edge.model)
        if weights is not None:
            weights.merge_into(self.model)
            arrange_weights(self.model, edge.model)
        self.decoder = Decoder(self.model, edge.tokenizer)
        # A model's own end-of-sequence tokens are not always those that its chat template closes a turn with.
        self.decoder.stop_token_ids |= frozenset(self.renderer.end_token_ids)
        self.scorer = ToolScorer(self.decoder, self.renderer, registry, match)
        self._grammars: dict[ToolChoice, ToolGrammar] = {}
        self._lock = threading.Lock()

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

        grammar: hold the step to the registry's names and schemas; without it, text is free and `tool_choice` unused.
        score_tools: where the model has to choose among tools, under the grammar and greedily, score all of them (see
            `ToolScorer`) instead of spelling a name; the stream's `tools` has the probabilities.
        A step ends behind a tool call (`Observation:` is not part of it), or with the answer.

        Raises:
            PromptError: the conversation is no prompt, or too long for the model.
            GrammarError: the registry or the tool choice can't be turned into a grammar.
        """
        prompt = self.renderer.user_turn(turns)
        sampling = self._sampling(sampling, grammar)
        if not grammar:
            return StepCompletionStream(self.decoder.stream(prompt, sampling, None, cancel))
        if not (score_tools and self._has_choice(sampling, tool_choice, cancel)):
            return StepCompletionStream(self.decoder.stream(prompt, sampling, self.grammar(tool_choice), cancel))
        scored = self.score(prompt, tool_choice, opening=not turns[-1].steps)
        return StepCompletionStream(self.decoder.stream(scored.read, sampling, scored.grammar, cancel), scored)

    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        sampling: Sampling | None = None,
        *,
        grammar: bool = True,
        tool_choice: ToolChoice = "auto",
        score_tools: bool = True,
        cancel: threading.Event | None = None,
    ) -> list[Completion]:
        """Decode the next step of several conversations in batches. Arguments and errors as `stream`."""
        prompts = [self.renderer.user_turn(turns) for turns in conversations]
        sampling = self._sampling(sampling, grammar)
        if not grammar:
            return self.decoder.generate(prompts, sampling, None, cancel)
        if not (score_tools and self._has_choice(sampling, tool_choice, cancel)):
            return self.decoder.generate(prompts, sampling, self.grammar(tool_choice), cancel)
        scored = [
            self.score(prompt, tool_choice, opening=not turns[-1].steps)
            for prompt, turns in zip(prompts, conversations, strict=True)
        ]
        reads, grammars = [one.read for one in scored], [one.grammar for one in scored]
        completions = self.decoder.generate(reads, sampling, grammars, cancel)
        return [one.completed(completion) for one, completion in zip(scored, completions, strict=True)]

    def _has_choice(self, sampling: Sampling, tool_choice: ToolChoice, cancel: threading.Event | None) -> bool:
        # Nothing is scored for a caller who has gone; decoding then ends before its first token.
        if cancel is not None and cancel.is_set():
            return False
        if sampling.temperature > 0 or tool_choice not in ("auto", "any"):
            return False
        return len(self.registry) > 1 or self.match is not None

    def score(
        self,
        prompt: Sequence[int],
        tool_choice: ToolChoice = "auto",
        *,
        opening: bool,
        scorer: ToolScorer | None = None,
    ) -> "ScoredPrompt":
        """Read a prompt, score the tools behind it, and hold what follows to the one that was chosen.

        prompt: ends in `THOUGHT_QUESTION`. tool_choice: "auto" or "any". opening: whether no step was taken in the open
            turn yet.
        scorer: in place of the model's own.
        """
        started = time.perf_counter()
        scorer = scorer or self.scorer
        request = scorer.read(prompt)
        tools = scorer(request, opening=opening)
        chosen = tools.best if tool_choice == "any" else tools.chosen
        grammar = self.grammar("none" if chosen is None else chosen)
        return ScoredPrompt(request.prompt, grammar, tools, time.perf_counter() - started)

    def grammar(self, tool_choice: ToolChoice = "auto") -> ToolGrammar:
        """The registry's grammar for a tool choice, made when it is first asked for.

        Raises:
            GrammarError: see `ToolGrammar`.
        """
        with self._lock:
            if tool_choice not in self._grammars:
                # The renderer has refused tokenizers of any other kind.
                tokenizer = cast(PreTrainedTokenizerFast, self.edge.tokenizer)
                self._grammars[tool_choice] = ToolGrammar(self.registry, tokenizer, tool_choice)
            return self._grammars[tool_choice]

    @staticmethod
    def _sampling(sampling: Sampling | None, grammar: bool) -> Sampling:
        sampling = sampling or Sampling()
        # The grammar ends a call by itself; free text has to be cut before the model invents the tool's report.
        return sampling if grammar else replace(sampling, stop=(*sampling.stop, OBSERVATION_STOP))


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt that was read and whose tool is chosen; seconds: what that took."""

    read: ReadPrompt
    grammar: ToolGrammar
    tools: ToolProbabilities
    seconds: float

    def completed(self, completion: Completion) -> Completion:
        """The completion with the reading and choosing counted in."""
        return replace(
            completion,
            cached_tokens=self.read.cached_tokens,
            first_token_seconds=self.seconds + completion.first_token_seconds,
            seconds=self.seconds + completion.seconds,
        )


class StepCompletionStream(CompletionStream):
    """A step while it is generated.

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
