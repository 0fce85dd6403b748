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
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, cache_folder
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization import disk_cache
from loragen_agents.specialization.shared_values import SharedValues

logger = logging.getLogger(__name__)

# A specialised SmolLM2-135M holds 160 MB of merged FFN weights of its own.
MEMORY_ENTRIES = 4
# Goes into the key; raise it when what is written changes.
_FORMAT = 5


@dataclass(frozen=True)
class Specialization:
    """An edge LM specialised on a registry and a system text.

    Args:
        model: the specialised edge LM, ready to decode.
        weights: the LoRA weights that were merged into it.
        generator: what made it. It stays loaded, and with it both language models, as long as the specialisation is
            kept: the next registry needs them too.
        definition_tokens: tokens of the edge LM's tokenizer that the same definitions and system text would take up in
            every prompt (the full ReAct prompt less the user turn).
        seconds: what generating and merging took; 0 when the specialisation came from memory or disk.
        source: where it came from.
        key: SHA-256 of everything that it depends on; also the name of its folder on disk.
    """

    model: SpecializedLM
    weights: LoRAWeights
    generator: LoRAGenerator
    registry: ToolRegistry
    system_text: str
    definition_tokens: int
    seconds: float
    source: Literal["generated", "disk", "memory"]
    key: str

    @cached_property
    def weights_are_zero(self) -> bool:
        """Whether the LoRA weights change nothing, as those of a generator that was never trained."""
        return not any(bool(b.any()) for _, b in self.weights.tensors.values())


def _own_bytes(made: "Specialization") -> int:
    """Bytes of the matrices that a specialised model does not share with its edge LM."""
    shared = {parameter.data_ptr() for parameter in made.model.edge.model.parameters()}
    return sum(parameter.nbytes for parameter in made.model.model.parameters() if parameter.data_ptr() not in shared)


_specializations: SharedValues[Specialization] = SharedValues(MEMORY_ENTRIES, _own_bytes)


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
                weights, match = generator.generate_with_match(definitions, registry)
                weights = weights.detach()
            else:
                weights, match = kept
            model = SpecializedLM(edge, weights, registry, match)
        seconds = time.perf_counter() - started if source == "generated" else 0.0
        if cache and source == "generated":
            _keep(folder, weights, match, edge)
        probe = [Turn("")]
        definition_tokens = len(renderer.full_react(registry, probe, system_text)) - len(renderer.user_turn(probe))
        made = Specialization(model, weights, generator, registry, system_text, definition_tokens, seconds, source, key)
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


def _keep(folder: Path, weights: LoRAWeights, match: ToolMatch | None, edge: LanguageModel) -> None:
    """Write to the disk cache. A disk that is full or can't be written to costs the next process time, nothing else."""
    try:
        disk_cache.write(folder, weights, match, edge)
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
    parts = [_FORMAT, registry.fingerprint, definitions, generator.fingerprint, models]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
