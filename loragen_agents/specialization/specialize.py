"""From a registry and a system text to a specialised edge LM, once: what was made before comes from memory or disk.

In memory are the last few specialised models (merged FFN weights; everything else is shared with the edge LM that they
stand on). On disk, under the cache folder, is one PEFT folder for each specialisation. Language models and generators
are loaded once a process. All of it may be used from several threads. Knows nothing of LangChain.
"""

import hashlib
import json
import logging
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Generic, Literal, TypeVar

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.errors import CheckpointError
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, cache_folder, gated_ffn_layers, load_language_model
from loragen_agents.registry import ToolRegistry

logger = logging.getLogger(__name__)

# A specialised SmolLM2-135M holds 160 MB of merged FFN weights of its own.
MEMORY_ENTRIES = 4
# A PEFT folder for SmolLM2-135M has 10 to 40 MB, by the number of tools and arguments.
DISK_ENTRIES = 64
# Writing a folder takes a second; a temporary one this old has lost its writer.
_ABANDONED_SECONDS = 3600
_FORMAT = 3
_MANIFEST = "specialization.json"
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MATCH = "tool_match.safetensors"


@dataclass(frozen=True)
class Specialization:
    """An edge LM specialised on a registry and a system text.

    model: the specialised edge LM, ready to decode.
    weights: the LoRA weights that were merged into it.
    definition_tokens: tokens of the edge LM's tokenizer that the same definitions and system text would take up in
        every prompt (the full ReAct prompt less the user turn).
    seconds: what generating and merging took; 0 when the specialisation came from memory or disk.
    source: where it came from.
    key: SHA-256 of everything that it depends on; also the name of its folder on disk.
    """

    model: SpecializedLM
    weights: LoRAWeights
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


Value = TypeVar("Value")


class _Shared(Generic[Value]):
    """Values by key, each made once even when several threads ask at the same time; the least recently used go first.

    limit: how many are kept; None keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._table = threading.Lock()
        # One lock for all keys: making a value keeps every core busy, so two at a time would not end sooner, and the
        # generator's pass hooks into the cloud LM's modules.
        self._making = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> tuple[Value, bool]:
        """The value of `key` and whether it was there already."""
        found = self._look_up(key)
        if found is not None:
            return found, True
        with self._making:
            found = self._look_up(key)
            if found is not None:
                return found, True
            made = make()
            with self._table:
                self._values[key] = made
                while self.limit is not None and len(self._values) > self.limit:
                    self._values.popitem(last=False)
            return made, False

    def _look_up(self, key: Hashable) -> Value | None:
        with self._table:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def clear(self) -> None:
        with self._table:
            self._values.clear()


_specializations: _Shared[Specialization] = _Shared(MEMORY_ENTRIES)
_language_models: _Shared[LanguageModel] = _Shared()
_generators: _Shared[LoRAGenerator] = _Shared()


def shared_language_model(name: str, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
    """`load_language_model`, once a process for each (name, device, dtype).

    Raises:
        ModelLoadError: the model can't be found, fetched, checked or converted.
    """
    return _language_models.get((name, device, dtype), lambda: load_language_model(name, device=device, dtype=dtype))[0]


def shared_generator(name: str, *, cloud: LanguageModel, edge: LanguageModel) -> LoRAGenerator:
    """`LoRAGenerator.load`, once a process for each ("default" or folder, cloud LM, edge LM).

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or was trained for other language models.
    """
    key = (name, id(cloud), id(edge))
    return _generators.get(key, lambda: LoRAGenerator.load(name, cloud=cloud, edge=edge))[0]


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
    depends on: the registry, the rendered definitions with the system text, the generator's weights and those of both
    language models. A folder on disk that is damaged is made again.

    cache: False generates in any case and keeps nothing.

    Raises:
        GrammarError: the registry's argument schemas can't be turned into a grammar.
        OSError: the cache folder can't be written.
    """
    renderer = shared_renderer(edge.tokenizer)
    definitions = _definitions(renderer, registry, system_text)
    key = _key(registry, definitions, edge, cloud, generator)

    def make() -> Specialization:
        folder = cache_folder() / "specializations" / key
        kept = _read(folder) if cache else None
        source: Literal["generated", "disk"] = "disk"
        started = time.perf_counter()
        if kept is None:
            source = "generated"
            weights, match = generator.generate_with_match(definitions, registry)
            weights = weights.detach()
        else:
            weights, match = kept
        model = SpecializedLM(edge, weights, registry, match)
        seconds = time.perf_counter() - started if source == "generated" else 0.0
        if cache and source == "generated":
            _write(folder, weights, match, edge)
        probe = [Turn("")]
        definition_tokens = len(renderer.full_react(registry, probe, system_text)) - len(renderer.user_turn(probe))
        made = Specialization(model, weights, registry, system_text, definition_tokens, seconds, source, key)
        if made.weights_are_zero:
            logger.warning("The generator is untrained: its LoRA weights are zero, and the model is the bare edge LM.")
        return made

    if not cache:
        return make()
    specialization, kept = _specializations.get((key, id(edge)), make)
    return replace(specialization, seconds=0.0, source="memory") if kept else specialization


def forget_specializations() -> None:
    """Let go of the specialised models in memory. Those on disk stay."""
    _specializations.clear()


@lru_cache(maxsize=32)
def _definitions(renderer: PromptRenderer, registry: ToolRegistry, system_text: str) -> str:
    # They are asked for at every step of an agent, and rendering them for 29 tools takes as long as reading a prompt.
    return renderer.definitions(registry, system_text)


def _key(
    registry: ToolRegistry, definitions: str, edge: LanguageModel, cloud: LanguageModel, generator: LoRAGenerator
) -> str:
    parts = [_FORMAT, registry.fingerprint, definitions, generator.fingerprint, edge.fingerprint, cloud.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(folder: Path) -> tuple[LoRAWeights, ToolMatch | None] | None:
    """What is kept in `folder`; None when there is nothing or what is there is damaged (it is removed then)."""
    if not folder.is_dir():
        return None
    try:
        hashes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name in (*_FILES, *([_MATCH] if _MATCH in hashes else [])):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != hashes[name]:
                raise CheckpointError(f"{folder / name} has changed since it was written")
        weights = LoRAWeights.load_peft(folder)
        match = ToolMatch.load(folder / _MATCH) if _MATCH in hashes else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The kept specialisation %s is damaged (%s); it is made again.", folder, error)
        _remove(folder)
        return None
    with suppress(OSError):
        folder.touch()  # the least recently used folders go first
    return weights, match


def _write(folder: Path, weights: LoRAWeights, match: ToolMatch | None, edge: LanguageModel) -> None:
    """Write the whole folder under a temporary name, then rename it: a reader sees all of it or nothing."""
    if not weights.tensors:
        return  # nothing to keep, and PEFT has no way to write it
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        weights.save_peft(temporary, edge.name, [path for path, _ in gated_ffn_layers(edge.model)])
        files = list(_FILES)
        if match is not None:
            match.save(temporary / _MATCH)
            files.append(_MATCH)
        hashes = {name: hashlib.sha256((temporary / name).read_bytes()).hexdigest() for name in files}
        (temporary / _MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process wrote the same folder meanwhile; what it holds is the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(folder.parent)


def _prune(parent: Path) -> None:
    """Remove the least recently used folders beyond `DISK_ENTRIES`, and what a killed process left half-written."""
    ages: dict[Path, float] = {}
    for path in parent.iterdir():
        with suppress(OSError):  # another process may remove it at the same time
            ages[path] = path.stat().st_mtime
    whole = [path for path in sorted(ages, key=ages.__getitem__) if not path.name.startswith(".")]
    for path in whole[: max(0, len(whole) - DISK_ENTRIES)]:
        _remove(path)
    for path in ages.keys() - set(whole):
        if ages[path] < time.time() - _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder, in one rename as far as others can see."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
