"""From a registry and a system text to a specialised edge LM, once: what was made before comes from memory or disk.

In memory are the last few specialised models (merged FFN weights; everything else is shared with the edge LM that they
stand on). May be used from several threads. Knows nothing of LangChain.
"""

import hashlib
import json
import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.decoding import Decoder
from loragen_agents.edge.reading import PassReader
from loragen_agents.edge.specialized import SpecializedLM, merged_decoder
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, cache_folder
from loragen_agents.models.runtimes import torch_runs
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization import disk_cache
from loragen_agents.specialization.shared_models import forget_last_generator
from loragen_agents.specialization.shared_values import SharedValues

logger = logging.getLogger(__name__)

# A specialised SmolLM2-135M holds 160 MB of merged FFN weights of its own.
MEMORY_ENTRIES = 4
# Larger registries were not measured: with a tool head, and by the weights alone.
_MEASURED_TOOLS, _MEASURED_TOOLS_ALONE = 1000, 24
# Goes into the key; raise it when what is written changes.
_FORMAT = 6


@dataclass(frozen=True)
class Specialization:
    """An edge LM specialised on a registry and a system text.

    Args:
        model: the specialised edge LM, ready to decode.
        parts: the weights that it was made of; their sum is `weights`.
        generator: what made it. It stays loaded, and with it both language models, as long as the specialisation is
            kept: the next registry needs them too. None where a service made it.
        definition_tokens: tokens of the edge LM's tokenizer that the same definitions and system text would take up in
            every prompt (the full ReAct prompt less the user turn).
        seconds: what generating and merging took, or asking a service; 0 when it came from memory or disk.
        source: where it came from.
        key: SHA-256 of everything that it depends on; also the name of its folder on disk.
    """

    model: SpecializedLM
    parts: RegistryWeights
    generator: LoRAGenerator | None
    registry: ToolRegistry
    system_text: str
    definition_tokens: int
    seconds: float
    source: Literal["generated", "disk", "memory"]
    key: str

    @property
    def weights(self) -> LoRAWeights:
        """The sum of all weights, as it is exported to other runtimes; made when it is first asked for."""
        return self.parts.combined()

    @cached_property
    def weights_are_zero(self) -> bool:
        """Whether the LoRA weights change nothing, as those of a generator that was never trained."""
        merged = self.weights if self.parts.keys is None else self.parts.shared
        return not any(bool(b.any()) for _, b in merged.tensors.values())


def _own_bytes(made: "Specialization") -> int:
    """Bytes of the matrices that a specialised model shares with neither its edge LM nor other registries."""
    own = 0 if made.parts.keys is None else made.parts.keys.vectors.nbytes
    if made.parts.keys is not None and made.generator is not None and not made.generator.config.uses_cloud:
        return own
    decoder, base = made.model.decoder, made.model.edge.model
    if decoder.runtime == "openvino":  # a graph of its own, with a byte for each weight
        return own + sum(parameter.numel() for parameter in base.parameters())
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    parameters = decoder.model.parameters()
    return own + sum(parameter.nbytes for parameter in parameters if parameter.data_ptr() not in shared)


_specializations: SharedValues[Specialization] = SharedValues(MEMORY_ENTRIES, _own_bytes)
# Where the merged weights are the same for every registry, one merged model serves all of them. Each value keeps the
# edge LM, whose id is part of its key, alive.
_decoders: SharedValues[tuple[LanguageModel, Decoder]] = SharedValues(MEMORY_ENTRIES)


def specialize(
    registry: ToolRegistry,
    system_text: str = "",
    *,
    edge: LanguageModel,
    cloud: LanguageModel,
    generator: LoRAGenerator,
    cache: bool = True,
) -> Specialization:
    """The edge LM specialised on `registry` and `system_text`.

    Made by one pass of the generator unless it is kept from before, in memory or on disk, under everything that it
    depends on: the registry, the rendered definitions with the system text, the generator's weights, and the weights
    and dtypes of both language models. A folder on disk that is damaged is made again; where the cache folder can't be
    written to, a warning says so.

    Args:
        cache: False generates in any case and keeps nothing.

    Raises:
        GrammarError: the registry's argument schemas can't be turned into a grammar.
    """
    renderer = shared_renderer(edge.tokenizer)
    definitions = _definitions(renderer, registry, system_text)
    key = _key(registry, definitions, edge, cloud, generator)

    def make() -> Specialization:
        folder = cache_folder() / "specializations" / key
        kept = disk_cache.read(folder) if cache else None
        source: Literal["generated", "disk"] = "disk"
        started = time.perf_counter()
        # Others may use what is made here outside the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if kept is None:
                source = "generated"
            decoder: Decoder | None = None
            if kept is not None and kept.vectors is None:
                assert kept.weights is not None
                parts = RegistryWeights.of(kept.weights)
            else:
                vectors, shared = (None, None) if kept is None else (kept.vectors, kept.weights)
                shared = generator.shared_weights(definitions) if shared is None else shared
                if generator.tool_head is not None and registry:
                    decoder = _decoder(edge, generator, shared, cache)
                # Tools are read by what will read requests, unless that is PyTorch, where the memory of a merged copy
                # can be spared.
                reader = PassReader(decoder) if decoder is not None and decoder.runtime == "openvino" else None
                parts = generator.generate_parts(definitions, registry, vectors=vectors, shared=shared, reader=reader)
            model = SpecializedLM(edge, parts, registry, decoder)
        seconds = time.perf_counter() - started if source == "generated" else 0.0
        if cache and source == "generated":
            _keep(folder, parts, generator, edge)
        probe = [Turn("")]
        definition_tokens = len(renderer.full_react(registry, probe, system_text)) - len(renderer.user_turn(probe))
        made = Specialization(model, parts, generator, registry, system_text, definition_tokens, seconds, source, key)
        _warn_of_size(registry, parts)
        if made.weights_are_zero:
            logger.warning("The generator is untrained: its LoRA weights are zero, and the model is the bare edge LM.")
        return made

    if not cache:
        return make()
    specialization, kept = _specializations.get((key, id(edge)), make)
    return replace(specialization, seconds=0.0, source="memory") if kept else specialization


def bound_specializations(entries: int = MEMORY_ENTRIES, max_bytes: int | None = None) -> None:
    """Set how many specialised models are kept in memory, and how many bytes of them; the last used one always is."""
    _specializations.bound(entries, max_bytes)


def specializations_in_memory() -> tuple[int, int]:
    """How many specialised models are in memory, and their bytes."""
    return len(_specializations), _specializations.bytes


def forget_specializations() -> None:
    """Drop the specialised models in memory, and with them what only they hold. Those on disk stay."""
    _specializations.clear()
    _decoders.clear()
    forget_last_generator()


def _decoder(edge: LanguageModel, generator: LoRAGenerator, shared: LoRAWeights, cache: bool) -> Decoder:
    """The decoder of the shared weights; where these are the same for every registry, it serves all of them."""
    if generator.config.uses_cloud:
        return merged_decoder(edge, shared, for_one=True)
    if not cache:
        return merged_decoder(edge, shared)
    key = (id(edge), generator.fingerprint)
    return _decoders.get(key, lambda: (edge, merged_decoder(edge, shared)))[0][1]


def _warn_of_size(registry: ToolRegistry, parts: RegistryWeights) -> None:
    measured = _MEASURED_TOOLS if parts.keys is not None else _MEASURED_TOOLS_ALONE
    if len(registry) > measured:
        logger.warning(
            "The registry has %d tools; the choice of a tool was measured with up to %d. Check the results, or give "
            "fewer tools.",
            len(registry),
            measured,
        )


def _keep(folder: Path, parts: RegistryWeights, generator: LoRAGenerator, edge: LanguageModel) -> None:
    """Write to the disk cache. A disk that is full or can't be written to costs the next process time, nothing else."""
    if parts.keys is None:
        kept = disk_cache.Kept(parts.combined(), None)
    else:
        kept = disk_cache.Kept(parts.shared if generator.config.uses_cloud else None, parts.keys.vectors)
    try:
        disk_cache.write(folder, kept, edge)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "This specialisation can't be kept in %s and will be generated again (%s). Free some space there, or set "
            "LORAGEN_AGENTS_CACHE to another folder.",
            folder.parent,
            error,
        )


@lru_cache(maxsize=32)
def _definitions(renderer: PromptRenderer, registry: ToolRegistry, system_text: str) -> str:
    # They are asked for at every step of an agent, and rendering them for 29 tools takes as long as reading a prompt.
    return renderer.definitions(registry, system_text)


def _key(
    registry: ToolRegistry, definitions: str, edge: LanguageModel, cloud: LanguageModel, generator: LoRAGenerator
) -> str:
    # Weights read in bf16 differ from those read in float32 by half a percent, so they are kept apart.
    models = [(model.fingerprint, str(model.dtype)) for model in (edge, cloud)]
    # So do activations that OpenVINO works out.
    arithmetic = "torch"
    if not torch_runs(edge.device.type):
        from loragen_agents.edge.openvino.compiled import quantisation

        arithmetic, _ = quantisation()
    parts = [_FORMAT, registry.fingerprint, definitions, generator.fingerprint, models, arithmetic]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
