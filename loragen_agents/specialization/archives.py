"""A specialisation as one archive, with which an edge decodes that has neither generator nor cloud LM.

The archive is a zip file of safetensors and JSON, nothing in it is executed. It holds what this package decodes with:
the shared weights as a PEFT folder, the keys that choose a tool and its arguments, and each tool's updates before what
the tools have in common is taken off, from which the edge makes those of single tools and the sum. Where there are no
keys, the sum is all there is.

Mapped updates are kept in float16, by direction and length; other tensors in bf16 where all of their numbers are bf16
numbers, as those of a checkpoint in bf16 are, else as they are.

Other runtimes take the sum, as a PEFT folder in an archive of its own.
"""

import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loragen_agents.adapter.argument_reader import ArgumentKeys, ArgumentReader
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.adapter.tool_keys import RequestMaps, ToolKeys
from loragen_agents.adapter.tool_updates import MappedUpdates, ToolUpdates, ValueMaps
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.errors import CheckpointError
from loragen_agents.generator.argument_head import argument_keys
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.specialize import Specialization

_FORMAT = 5
_MANIFEST = "specialization.json"
_PEFT = ("adapter_config.json", "adapter_model.safetensors")
_UPDATES = "tool_updates.safetensors"
_CHOICE = "tool_choice.safetensors"
_ARGUMENTS = "arguments.safetensors"
_READER = "reader."
_MAPS = ("means", "maps", "none", "bias", "scale")
_VALUE_MAPS = ("scale", "down", "up")
# What reading a damaged archive raises; RuntimeError comes of tensors whose shapes don't fit each other.
_DAMAGE = (zipfile.BadZipFile, SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
# More than any adapter for a model that an edge runs; a small zip file can unfold to anything.
MAX_BYTES = 2**31


def write_archive(made: Specialization, edge: LanguageModel) -> bytes:
    """The archive of a specialisation.

    Raises:
        ValueError: the weights have no entry, so there is nothing to hand over.
    """
    parts, keys = made.parts, made.parts.keys
    merged = parts.combined() if keys is None else parts.shared
    files = _peft(merged, edge) if keys is None or merged.tensors else {}
    updates = parts.tool_updates
    counts: list[int] = []
    if keys is not None:
        tensors = {name: getattr(keys.requests, name) for name in _MAPS}
        files[_CHOICE] = _saved({**tensors, "vectors": keys.vectors})
        if updates is not None:
            read = updates.read(updates.names)
            counts = [len(tool.kinds) for tool in read]
            files[_UPDATES] = _saved(_update_tensors(updates.maps, MappedUpdates.joined(read)))
    arguments = [own for tool in made.registry.names if (own := parts.arguments(tool)) is not None]
    if arguments:
        files[_ARGUMENTS] = _saved(_argument_tensors(arguments))
    manifest = {
        "format": _FORMAT,
        "key": made.key,
        "tools": made.registry.to_openai(),
        "input_format": made.registry.input_format,
        "system_text": made.system_text,
        "definition_tokens": made.definition_tokens,
        "edge_fingerprint": edge.fingerprint,
        "merged": {"layers": merged.layers, "rank": merged.rank, "alpha": merged.alpha},
        "choice_layers": [] if keys is None else list(keys.requests.layers),
        "update_layers": [] if updates is None else list(updates.maps.layers),
        "update_counts": counts,
        "argument_reader": arguments[0].reader.settings if arguments else None,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    return _packed({_MANIFEST: json.dumps(manifest).encode(), **files})


def write_peft_archive(made: Specialization, edge: LanguageModel) -> bytes:
    """The sum of all weights as a PEFT folder, packed; for runtimes that know nothing of this package.

    Raises:
        ValueError: the weights have no entry.
    """
    return _packed(_peft(made.weights, edge))


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
        told = manifest["merged"]
        merged = LoRAWeights(told["layers"], told["rank"], told["alpha"], {})
        if _PEFT[0] in files:
            merged = _load_peft(files)
        parts = RegistryWeights.of(merged) if _CHOICE not in files else _parts(files, manifest, registry, merged)
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
    except (
        zipfile.BadZipFile,
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"the archive of a specialisation is damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _parts(
    files: dict[str, bytes], manifest: dict[str, Any], registry: ToolRegistry, shared: LoRAWeights
) -> RegistryWeights:
    """The weights of a registry with keys."""
    choice = _loaded(files[_CHOICE])
    keys = ToolKeys(RequestMaps(tuple(manifest["choice_layers"]), *(choice[name] for name in _MAPS)), choice["vectors"])
    read = None
    if _ARGUMENTS in files:
        read = _argument_keys(_loaded(files[_ARGUMENTS]), manifest["argument_reader"], registry).__getitem__
    if _UPDATES not in files:
        return RegistryWeights(shared, keys, lambda: shared, arguments=read)
    maps, updates = _read_updates(_loaded(files[_UPDATES]), tuple(manifest["update_layers"]))
    mapped = dict(zip(registry.names, updates.split(manifest["update_counts"]), strict=True))
    tools = ToolUpdates(registry.names, shared.layers, maps, lambda names: [mapped[name] for name in names])
    return RegistryWeights.of_tools(shared, keys, tools, read)


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


def _update_tensors(maps: ValueMaps, updates: MappedUpdates) -> dict[str, Tensor]:
    tensors = {name: getattr(maps, name) for name in _VALUE_MAPS}
    for name in ("keys", "directions"):
        vectors = getattr(updates, name).float()
        length = vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        tensors |= {name: (vectors / length).half(), f"{name}_length": length}
    return tensors | {"kinds": updates.kinds.to(torch.int8)}


def _read_updates(tensors: dict[str, Tensor], layers: tuple[int, ...]) -> tuple[ValueMaps, MappedUpdates]:
    keys, directions = (tensors[name] * tensors[f"{name}_length"] for name in ("keys", "directions"))
    maps = ValueMaps(layers, *(tensors[name] for name in _VALUE_MAPS))
    return maps, MappedUpdates(keys, directions, tensors["kinds"].long())


def _saved(tensors: dict[str, Tensor]) -> bytes:
    """Tensors that own their memory, as safetensors asks for, each as small as it can be without loss."""
    return save({name: _small(tensor.detach().cpu()).clone().contiguous() for name, tensor in tensors.items()})


def _small(tensor: Tensor) -> Tensor:
    """In bf16, where this changes no number."""
    if tensor.dtype != torch.float32:
        return tensor
    small = tensor.to(torch.bfloat16)
    return small if torch.equal(small.float(), tensor) else tensor


def _loaded(content: bytes) -> dict[str, Tensor]:
    """Tensors as `_saved` was given them, numbers in float32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load(content).items()}


def _peft(weights: LoRAWeights, edge: LanguageModel) -> dict[str, bytes]:
    small = replace(weights, tensors={entry: (_small(a), _small(b)) for entry, (a, b) in weights.tensors.items()})
    with tempfile.TemporaryDirectory() as folder:
        # Not the path of a folder on this machine: whoever gets the archive has the model somewhere else.
        small.save_peft(folder, Path(edge.name).name, [path for path, _ in gated_ffn_layers(edge.model)])
        return {name: (Path(folder) / name).read_bytes() for name in _PEFT}


def _load_peft(files: dict[str, bytes]) -> LoRAWeights:
    with tempfile.TemporaryDirectory() as folder:
        for name in _PEFT:
            (Path(folder) / name).write_bytes(files[name])
        return LoRAWeights.load_peft(folder).to(dtype=torch.float32)


def _packed(files: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return archive.getvalue()


def _unpack(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise CheckpointError(f"it unfolds to {size} bytes, expected at most {MAX_BYTES}")
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}
