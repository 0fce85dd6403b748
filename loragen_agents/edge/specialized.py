"""The specialised edge LM: one registry's LoRA weights merged into a module tree of their own, decoding at bare speed.

Of the edge LM only the FFN matrices that the weights change exist a second time; every other tensor is shared with it
and with all its other specialisations. So registries never see each other, in whatever threads they are served. Where
the weights come from, and LangChain, are not this module's business.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from transformers import PreTrainedTokenizerFast

from loragen_agents.edge.decoding import Completion, CompletionStream, Decoder
from loragen_agents.edge.grammar import ToolChoice, ToolGrammar
from loragen_agents.edge.sampling import Sampling
from loragen_agents.language_models import LanguageModel
from loragen_agents.lora_weights import LoRAWeights
from loragen_agents.prompting import Turn
from loragen_agents.react import OBSERVATION_STOP
from loragen_agents.registry import ToolRegistry
from loragen_agents.sharing import clone_sharing_tensors, shared_renderer


class SpecializedLM:
    """An edge LM + LoRA weights + the grammar of a registry. Safe to use from several threads.

    edge: the base; it is left as it is. weights: None gives the bare edge LM. registry: whose steps are decoded.
    `model`, `decoder` and `renderer` are there for those who need more than a step.

    Raises:
        ValueError: the weights are for another model.
        ModelLoadError: the edge LM can't be cloned or decoded.
        PromptError: its tokenizer's chat template can't be followed.
    """

    def __init__(self, edge: LanguageModel, weights: LoRAWeights | None, registry: ToolRegistry) -> None:
        self.edge, self.weights, self.registry = edge, weights, registry
        self.renderer = shared_renderer(edge.tokenizer)
        self.model = clone_sharing_tensors(edge.model)
        if weights is not None:
            weights.merge_into(self.model)
        self.decoder = Decoder(self.model, edge.tokenizer)
        # A model's own end-of-sequence tokens are not always those that its chat template closes a turn with.
        self.decoder.stop_token_ids |= frozenset(self.renderer.end_token_ids)
        self._grammars: dict[ToolChoice, ToolGrammar] = {}
        self._lock = threading.Lock()

    def stream(
        self,
        turns: Sequence[Turn],
        sampling: Sampling | None = None,
        *,
        grammar: bool = True,
        tool_choice: ToolChoice = "auto",
        cancel: threading.Event | None = None,
    ) -> CompletionStream:
        """Decode the next step of a conversation, piece by piece: what follows `THOUGHT_QUESTION`.

        grammar: hold the step to the registry's names and schemas; without it, text is free and `tool_choice` unused.
        A step ends behind a tool call (`Observation:` is not part of it), or with the answer.

        Raises:
            PromptError: the conversation is no prompt, or too long for the model.
            GrammarError: the registry or the tool choice can't be turned into a grammar.
        """
        prompt = self.renderer.user_turn(turns)
        held = self.grammar(tool_choice) if grammar else None
        return self.decoder.stream(prompt, self._sampling(sampling, grammar), held, cancel)

    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        sampling: Sampling | None = None,
        *,
        grammar: bool = True,
        tool_choice: ToolChoice = "auto",
        cancel: threading.Event | None = None,
    ) -> list[Completion]:
        """Decode the next step of several conversations in batches. Arguments and errors as `stream`."""
        prompts = [self.renderer.user_turn(turns) for turns in conversations]
        held = self.grammar(tool_choice) if grammar else None
        return self.decoder.generate(prompts, self._sampling(sampling, grammar), held, cancel)

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
