"""Runs variants on real models: loads what a variant needs, gets it ready for a registry, and times each turn.

All variants share one edge LM and one decoding loop. Every turn starts with an empty prefix store, so that none gains
from the one before; a `+cached` variant keeps its definitions in it, and nothing else. Knows nothing of samples and
scores.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.bench import embedding
from loragen_agents.bench.costs import PeakMemory, TurnCost, kv_cache_bytes, model_bytes
from loragen_agents.bench.recipes import weights_of_task
from loragen_agents.bench.tasks import Written
from loragen_agents.bench.variants import Variant
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.react import ACTION, ANSWER, NO_TOOL, OBSERVATION_STOP, USE_TOOL
from loragen_agents.edge.kv_cache import PrefixStore
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import ScoredPrompt, SpecializedLM
from loragen_agents.errors import CheckpointError
from loragen_agents.generator import LoRAGenerator
from loragen_agents.generator.checkpoint import resolve
from loragen_agents.models.fingerprints import file_sha256
from loragen_agents.models.language_models import LanguageModel, load_cloud_model, load_language_model
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.specialize import specialize

if TYPE_CHECKING:
    from loragen_agents.edge.tool_choice import ToolScorer


class ModelSession:
    """A variant that is ready for one registry.

    Attributes:
        setup_seconds: what getting ready took: specialising, or reading the prefix into the cache.
    """

    def __init__(
        self,
        variant: Variant,
        model: SpecializedLM,
        registry: ToolRegistry,
        system_text: str,
        sampling: Sampling,
        setup_seconds: float | None,
    ) -> None:
        self.variant, self.model, self.registry, self.system_text = variant, model, registry, system_text
        self.setup_seconds = setup_seconds
        # The grammar ends a call by itself; free text is cut before the model invents the tool's report.
        self._sampling = sampling if variant.grammar else replace(sampling, stop=(OBSERVATION_STOP,))
        self._memory = PeakMemory(model.edge.device)
        # Pinned prefixes don't count as entries. Scoring tools needs one entry, for the prompt at hand.
        model.decoder.prefixes = PrefixStore(entries=1 if variant.choice else 0)
        if variant.cached:
            started = time.perf_counter()
            model.decoder.prefill(self._prefix(), pin=True)
            self.setup_seconds = time.perf_counter() - started
        self._scorer = self._make_scorer() if variant.choice and len(registry) else None

    def write(self, turns: Sequence[Turn]) -> Written:
        decoder = self.model.decoder
        if not self.variant.cached:
            decoder.prefixes.clear()
        scored: ScoredPrompt | None = None
        with self._memory.measure():
            if self._scorer is None:
                grammar = self.model.grammar() if self.variant.grammar else None
                (completion,) = decoder.generate([self._prompt(turns)], self._sampling, grammar)
            else:
                prompt = None if self.variant.match else self._prompt(turns)
                scored = self.model.score(turns, prompt=prompt, scorer=self._scorer)
                (completion,) = decoder.generate(
                    [scored.read], self._sampling, scored.grammar, updates=scored.updates, guided=[scored.guided]
                )
                completion = scored.completed(completion)
        cost = TurnCost(
            completion.prompt_tokens,
            completion.cached_tokens,
            len(completion.token_ids),
            completion.first_token_seconds,
            completion.seconds,
            self._memory.bytes,
        )
        tools = scored.tools.tools if scored and scored.tools else None
        return Written(self._prompt_text(turns), completion.text, completion.finish_reason, cost, tools)

    def choose(self, turns: Sequence[Turn]) -> Written:
        """Choose a tool or none, as `write` does, and write no more than that."""
        assert self._scorer is not None, "only variants that score all tools choose one"
        if not self.variant.cached:
            self.model.decoder.prefixes.clear()
        started = time.perf_counter()
        with self._memory.measure():
            prompt = self._prompt(self.model.due(turns) if self.variant.match else turns)
            tools = self._scorer(self._scorer.prefill(prompt))
        seconds = time.perf_counter() - started
        text = f"{NO_TOOL}{ANSWER}" if tools.chosen is None else f"{USE_TOOL}{ACTION} {tools.chosen}"
        cost = TurnCost(len(prompt), 0, 0, seconds, seconds, self._memory.bytes)
        return Written(self._prompt_text(turns), text, "stop", cost, tools.tools)

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        renderer = self.model.renderer
        if self.variant.definitions:
            return renderer.full_react(self.registry, turns, self.system_text)
        return renderer.user_turn(turns)

    def _prompt_text(self, turns: Sequence[Turn]) -> str:
        renderer = self.model.renderer
        if self.variant.definitions:
            return renderer.full_react_text(self.registry, turns, self.system_text)
        return renderer.user_turn_text(turns)

    def _make_scorer(self) -> ToolScorer:
        """The scorer of this variant's prompts."""
        from loragen_agents.edge.tool_choice import NameScorer

        if self.variant.match:
            return self.model.scorer
        renderer = cast(PromptRenderer, _VariantPrompts(self)) if self.variant.definitions else self.model.renderer
        return NameScorer(self.model.decoder, renderer, self.registry)

    def _prefix(self) -> list[int]:
        """The tokens that all prompts of this registry begin with."""
        one, other = (
            self.model.renderer.full_react(self.registry, turns, self.system_text)
            for turns in ([Turn("1")], [Turn("2", (), "3"), Turn("4")])
        )
        length = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        return one[:length]


class _VariantPrompts:
    """What a `NameScorer` asks of a renderer, with the variant's own prompts."""

    def __init__(self, session: ModelSession) -> None:
        self.user_turn = session._prompt
        self.encode_text = session.model.renderer.encode_text
        self.encode_with_starts = session.model.renderer.encode_with_starts


class ModelEngine:
    """Variants on one edge LM.

    Args:
        task: whose default weights the variants take (see `recipes`).
        edge, cloud: names of language models; cloud None: the edge LM itself.
        weights: `BASE=FOLDER` texts in place of the defaults.
        max_tokens: bound on the text of one step.

    Raises:
        ModelLoadError: a model can't be loaded.
        DataError: `weights` can't be read.
    """

    def __init__(
        self,
        task: str,
        *,
        edge: str,
        cloud: str | None = None,
        weights: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
        max_tokens: int = 96,
    ) -> None:
        self.edge = load_language_model(edge, device=device, dtype=dtype)
        self._cloud_name = cloud
        self._device, self._dtype = device, dtype
        self._weights = weights_of_task(task, weights)
        self._sampling = Sampling(max_tokens=max_tokens)
        self._cloud: LanguageModel | None = None
        self._generators: dict[str, LoRAGenerator] = {}
        self._adapters: dict[str, LoRAWeights] = {}
        self._sessions: dict[str, ModelSession | embedding.EmbeddingSession] = {}

    def open(
        self, variant: Variant, registry: ToolRegistry, system_text: str
    ) -> ModelSession | embedding.EmbeddingSession:
        """The variant's session for this registry: the last one where it fits, else a new one in its place."""
        session = self._sessions.get(variant.name)
        if session and session.registry.fingerprint == registry.fingerprint and session.system_text == system_text:
            return session
        self._sessions.pop(variant.name, None)
        self._sessions[variant.name] = made = self._session(variant, registry, system_text)
        return made

    def _session(
        self, variant: Variant, registry: ToolRegistry, system_text: str
    ) -> ModelSession | embedding.EmbeddingSession:
        if variant.embedding:
            return embedding.EmbeddingSession(registry, embedding.encoder(str(self.edge.device)))
        seconds = None
        if variant.base.source == "generator":
            specialization = specialize(
                registry,
                system_text,
                edge=self.edge,
                cloud=self._cloud_model(),
                generator=self._generator(variant),
                cache=False,
            )
            # Variants that leave the head out have nothing but the weights to carry the registry.
            model = specialization.model if variant.match else specialization.model.alone
            seconds = specialization.seconds
        else:
            adapter = self._adapter(variant) if variant.base.source == "peft" else None
            model = SpecializedLM(self.edge, adapter, registry)
        return ModelSession(variant, model, registry, system_text, self._sampling, seconds)

    def missing(self, variants: Sequence[Variant]) -> dict[str, str]:
        missing = {}
        for variant in variants:
            if variant.base.source == "none":
                continue
            if variant.embedding:
                if not embedding.installed():
                    missing[variant.name] = f"`{embedding.INSTALL}` brings it"
                continue
            weights = self._weights.get(variant.base_name)
            if weights is None:
                missing[variant.name] = f"give their folder with --weights {variant.base_name}=FOLDER"
            elif not resolve(weights.location).is_dir():
                missing[variant.name] = (
                    f"`{weights.command}` makes them" if weights.command else "no checkpoint is shipped"
                )
        return missing

    def describe(self, variants: Sequence[Variant]) -> dict[str, Any]:
        cloud = self._cloud_model() if any(variant.base.source == "generator" for variant in variants) else None
        return {
            "models": {
                "edge": {"name": self.edge.name, "fingerprint": self.edge.fingerprint},
                "cloud": {"name": cloud.name, "fingerprint": cloud.fingerprint} if cloud else None,
            },
            "weights": {
                variant.base_name: self._describe_weights(variant)
                for variant in variants
                if variant.base.source != "none"
            },
            "device": str(self.edge.device),
            "dtype": str(self.edge.dtype).removeprefix("torch."),
            "max_tokens": self._sampling.max_tokens,
            "variants_run": [variant.name for variant in variants],
        }

    def shape(self, variant: Variant) -> tuple[int, int]:
        session = self._sessions.get(variant.name)
        if isinstance(session, embedding.EmbeddingSession):
            return model_bytes(embedding.encoder(str(self.edge.device))), 0
        model = session.model.decoder.model if session else self.edge.model
        return model_bytes(model), kv_cache_bytes(self.edge.model.config, 1, self.edge.dtype)

    def output_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(self.edge.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]

    def first_token(self, name: str) -> int:
        """The first token of a tool's name where it stands in a step; two names that share it begin alike."""
        return int(self.edge.tokenizer(f" {name}", add_special_tokens=False).input_ids[0])

    def _cloud_model(self) -> LanguageModel:
        if self._cloud is None:
            self._cloud = load_cloud_model(self._cloud_name, self.edge, device=self._device, dtype=self._dtype)
        return self._cloud

    def _generator(self, variant: Variant) -> LoRAGenerator:
        location = self._weights[variant.base_name].location
        if location not in self._generators:
            generator = LoRAGenerator.load(location, self._cloud_model(), self.edge)
            self._generators[location] = generator.eval()
        return self._generators[location]

    def _adapter(self, variant: Variant) -> LoRAWeights:
        """LoRA weights that are the same for every registry: a PEFT folder, or a generator of one expert alone."""
        location = self._weights[variant.base_name].location
        if location not in self._adapters:
            if not (resolve(location) / "generator.json").is_file():
                self._adapters[location] = LoRAWeights.load_peft(location)
                return self._adapters[location]
            generator = self._generator(variant)
            if generator.config.n_experts != 1 or generator.tool_memory is not None:
                raise CheckpointError(
                    f"{location} is a generator that reads registries; variant {variant.name} takes plain LoRA: a PEFT "
                    "folder, or a generator of one expert without a tool memory"
                )
            self._adapters[location] = generator.generate("").detach()
        return self._adapters[location]

    def _describe_weights(self, variant: Variant) -> dict[str, Any]:
        if variant.embedding:
            return {"location": embedding.PACKAGE, "version": metadata.version(embedding.PACKAGE)}
        weights = self._weights[variant.base_name]
        if (resolve(weights.location) / "generator.json").is_file():
            generator = self._generator(variant)
            return {"location": weights.location, "fingerprint": generator.fingerprint, "notes": generator.notes}
        files = sorted(Path(weights.location).glob("adapter_model*.safetensors"))
        digest = hashlib.sha256("".join(file_sha256(path) for path in files).encode())
        return {"location": weights.location, "fingerprint": digest.hexdigest()}
