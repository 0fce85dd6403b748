"""A specialisation as one archive, with which an edge decodes that has neither generator nor cloud LM.

The archive is a zip file of safetensors and JSON, nothing in it is executed. Its top is a PEFT folder with the sum of
all weights, which any runtime takes. Beside it lie the parts that this package decodes with: the shared weights, the
updates of each tool, and the keys that choose a tool and its arguments.
"""

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loragen_agents.adapter.argument_reader import ArgumentKeys, ArgumentReader
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.adapter.tool_keys import RequestMaps, ToolKeys
from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.errors import CheckpointError
from loragen_agents.generator.argument_head import argument_keys
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.specialize import Specialization

_FORMAT = 4
_MANIFEST = "specialization.json"
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
_SHARED = "shared/"
_UPDATES = "tool_updates.safetensors"
_CHOICE = "tool_choice.safetensors"
_ARGUMENTS = "arguments.safetensors"
_READER = "reader."
_MAPS = ("means", "maps", "none", "bias", "scale")
# More than any adapter for a model that an edge runs; a small zip file can unfold to anything.
MAX_BYTES = 2**31


def write_archive(made: Specialization, edge: LanguageModel) -> bytes:
    """The archive of a specialisation.

    Raises:
        ValueError: the weights have no entry, so there is nothing to hand over.
    """
    paths = [path for path, _ in gated_ffn_layers(edge.model)]
    files = _peft(made.weights, edge, paths, "")
    keys, shared = made.parts.keys, made.parts.shared
    layers: list[int] = []
    if keys is not None:
        if shared.tensors:
            files |= _peft(shared, edge, paths, _SHARED)
        layers = list(keys.requests.layers)
        tensors = {name: getattr(keys.requests, name) for name in _MAPS}
        files[_CHOICE] = save(_plain({**tensors, "vectors": keys.vectors}))
        files[_UPDATES] = save(_plain(_update_tensors(made)))
    arguments = [own for tool in made.registry.names if (own := made.parts.arguments(tool)) is not None]
    if arguments:
        files[_ARGUMENTS] = save(_plain(_argument_tensors(arguments)))
    manifest = {
        "format": _FORMAT,
        "key": made.key,
        "tools": made.registry.to_openai(),
        "input_format": made.registry.input_format,
        "system_text": made.system_text,
        "definition_tokens": made.definition_tokens,
        "edge_fingerprint": edge.fingerprint,
        "shared": {"layers": shared.layers, "rank": shared.rank, "alpha": shared.alpha},
        "choice_layers": layers,
        "argument_reader": arguments[0].reader.settings if arguments else None,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for name, content in {_MANIFEST: json.dumps(manifest).encode(), **files}.items():
            out.writestr(name, content)
    return archive.getvalue()


def read_archive(content: bytes, edge: LanguageModel) -> Specialization:
    """The specialisation in an archive, ready to decode. Its `source` is "disk", and no time is counted.

    Raises:
        CheckpointError: the archive is damaged, or was made for another edge LM.
    """
    try:
        files = _unpack(content)
        manifest = json.loads(files[_MANIFEST])
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"its format is {manifest['format']}, expected {_FORMAT}; make it anew")
        for name, sha256 in manifest["sha256"].items():
            if hashlib.sha256(files[name]).hexdigest() != sha256:
                raise CheckpointError(f"{name} in it is not what was written; fetch it again")
        if manifest["edge_fingerprint"] != edge.fingerprint:
            raise CheckpointError(f"it was made for another edge LM than {edge.name}; use the one of the service")
        registry = ToolRegistry.from_tools(manifest["tools"], input_format=manifest["input_format"])
        combined = _load_peft(files, "")
        parts = RegistryWeights.of(combined)
        if _CHOICE in files:
            parts = RegistryWeights(*_choice_parts(files, manifest, registry, combined))
        return Specialization(
            SpecializedLM(edge, parts, registry),
            parts,
            None,
            registry,
            manifest["system_text"],
            int(manifest["definition_tokens"]),
            0.0,
            "disk",
            str(manifest["key"]),
        )
    except CheckpointError as error:
        raise CheckpointError(f"the archive of a specialisation can't be used: {error}") from error
    except (zipfile.BadZipFile, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the archive of a specialisation is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _choice_parts(
    files: dict[str, bytes], manifest: dict[str, Any], registry: ToolRegistry, combined: LoRAWeights
) -> tuple[Any, ...]:
    """What `RegistryWeights` is made of, for a registry with keys."""
    told = manifest["shared"]
    shared = LoRAWeights(told["layers"], told["rank"], told["alpha"], {})
    if _SHARED + _PEFT[0] in files:
        shared = _load_peft(files, _SHARED)
    choice = load(files[_CHOICE])
    keys = ToolKeys(RequestMaps(tuple(manifest["choice_layers"]), *(choice[name] for name in _MAPS)), choice["vectors"])
    tensors: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in registry.names}
    for name, tensor in load(files[_UPDATES]).items():
        tool, layer, side = name.split(".")
        tensors[registry.names[int(tool)]].setdefault(int(layer), {})[side] = tensor
    updates = {
        tool: DownUpdates({layer: (sides["A"], sides["B"]) for layer, sides in layers.items()})
        for tool, layers in tensors.items()
    }
    has_updates = any(tensors.values())
    read = None
    if _ARGUMENTS in files:
        read = _argument_keys(load(files[_ARGUMENTS]), manifest["argument_reader"], registry).__getitem__
    return shared, keys, lambda: combined, updates.__getitem__ if has_updates else None, read


def _argument_keys(
    tensors: dict[str, Tensor], settings: dict[str, Any], registry: ToolRegistry
) -> dict[str, ArgumentKeys]:
    reader = ArgumentReader(**settings)
    state = {name.removeprefix(_READER): tensor for name, tensor in tensors.items() if name.startswith(_READER)}
    reader.load_state_dict(state)
    reader.eval()
    return {tool.name: argument_keys(reader, tool, tensors[str(number)]) for number, tool in enumerate(registry)}


def _argument_tensors(keys: Sequence[ArgumentKeys]) -> dict[str, Tensor]:
    """The vectors of each tool's arguments, by its number, and the tensors of what reads requests for them."""
    state = keys[0].reader.state_dict()
    vectors = {str(number): own.vectors for number, own in enumerate(keys)}
    return vectors | {f"{_READER}{name}": tensor for name, tensor in state.items()}


def _update_tensors(made: Specialization) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, tool in enumerate(made.registry.names):
        updates = made.parts.updates(tool)
        for layer, (a, b) in (updates.tensors if updates is not None else {}).items():
            tensors[f"{number}.{layer}.A"], tensors[f"{number}.{layer}.B"] = a, b
    return tensors


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that own their memory, as safetensors asks for."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _peft(weights: LoRAWeights, edge: LanguageModel, paths: list[str], prefix: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        # Not the path of a folder on this machine: whoever gets the archive has the model somewhere else.
        weights.save_peft(folder, Path(edge.name).name, paths)
        return {prefix + name: (Path(folder) / name).read_bytes() for name in _PEFT}


def _load_peft(files: dict[str, bytes], prefix: str) -> LoRAWeights:
    with tempfile.TemporaryDirectory() as folder:
        for name in _PEFT:
            (Path(folder) / name).write_bytes(files[prefix + name])
        return LoRAWeights.load_peft(folder)


def _unpack(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise CheckpointError(f"it unfolds to {size} bytes, expected at most {MAX_BYTES}")
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}
