"""A generator on disk: `generator.safetensors` and `generator.json`, bound to the two language models it was made for.

Reads, writes and compares; does not know what the tensors mean. Never pickle.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loragen_agents.errors import CheckpointError
from loragen_agents.models.fingerprints import file_sha256
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.support.files import read_json_object, replacing

FORMAT, VERSION = "loragen-agents generator", 7
DEFAULT_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "default"

_DESCRIPTION_FILE = "generator.json"
_TENSOR_FILE = "generator.safetensors"
_ADVICE = "expected a folder that a generator was saved to; get the whole checkpoint folder again"


@dataclass(frozen=True)
class ModelIdentity:
    """What a checkpoint remembers of a language model: its name, its shapes and the fingerprint of its weights."""

    name: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    fingerprint: str

    @classmethod
    def of(cls, language_model: LanguageModel) -> "ModelIdentity":
        """The identity of a loaded model."""
        config = language_model.model.config.get_text_config()
        return cls(
            language_model.name,
            config.model_type,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            language_model.fingerprint,
        )

    def check(self, given: "ModelIdentity", side: str, path: Path, *, allow_other_weights: bool) -> None:
        """Compare the model that a checkpoint was made for with the one that is given.

        Raises:
            CheckpointError: shapes differ, or the weights do and `allow_other_weights` is False.
        """
        shapes = ("model_type", "layers", "hidden", "intermediate", "vocabulary")
        different = [
            f"{name} {getattr(self, name)} there, {getattr(given, name)} here"
            for name in shapes
            if getattr(self, name) != getattr(given, name)
        ]
        if different:
            raise CheckpointError(
                f"{path} was made for {self.name} as the {side} LM and does not fit {given.name}: "
                f"{'; '.join(different)}. Give the model it was made for, or a checkpoint for this one"
            )
        if self.fingerprint != given.fingerprint and not allow_other_weights:
            raise CheckpointError(
                f"{path} was made for {self.name} as the {side} LM; {given.name} has its shapes and other weights "
                f"(fingerprint {given.fingerprint[:12]}, expected {self.fingerprint[:12]}). Give the model it was made "
                "for, or allow other weights (allow_other_weights=True) and check the results"
            )


@dataclass(frozen=True)
class Description:
    """The JSON half of a checkpoint. cloud is None where the generator has no use for a cloud LM."""

    config: dict[str, Any]
    edge: ModelIdentity
    cloud: ModelIdentity | None
    notes: dict[str, Any]


def resolve(folder: str | Path) -> Path:
    """The folder of a checkpoint; "default" is the one that ships with the package."""
    return DEFAULT_CHECKPOINT if folder == "default" else Path(folder)


def write_checkpoint(folder: Path, description: Description, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write both files. Matrices are stored in `dtype`, vectors and counters as they are."""
    stored = {
        name: tensor.detach().cpu().to(dtype if tensor.dim() > 1 and tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    with replacing(folder / _TENSOR_FILE) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
        checksum = file_sha256(temporary)
    content = {"format": FORMAT, "version": VERSION, **asdict(description), "tensors_sha256": checksum}
    with replacing(folder / _DESCRIPTION_FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_description(folder: Path) -> Description:
    """Read the JSON half.

    Raises:
        CheckpointError: the file is missing, damaged or of another version of the format.
    """
    return _parse(read_json_object(folder / _DESCRIPTION_FILE, _ADVICE), folder / _DESCRIPTION_FILE)


def read_tensors(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors and hold them against those that a generator of this config has.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    path = folder / _TENSOR_FILE
    checksum = read_json_object(folder / _DESCRIPTION_FILE, _ADVICE).get("tensors_sha256")
    try:
        found = file_sha256(path)
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; get the whole checkpoint folder again") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get the checkpoint folder again") from error
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not hold the tensors that {_DESCRIPTION_FILE} calls for"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
    if found != checksum:
        raise CheckpointError(
            f"{path} is damaged or belongs to another {_DESCRIPTION_FILE} (SHA-256 {found[:12]}, expected "
            f"{str(checksum)[:12]}); get the checkpoint folder again"
        )
    return tensors


def fingerprint(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a description (as canonical JSON) and the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parse(content: dict[str, Any], path: Path) -> Description:
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a generator of loragen-agents")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r} of the format, and this package reads {VERSION}; use the "
            "package that wrote it, or train the generator again"
        )
    try:
        cloud = content["cloud"]
        return Description(
            dict(content["config"]),
            ModelIdentity(**content["edge"]),
            ModelIdentity(**cloud) if cloud is not None else None,
            dict(content["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error} (missing or of the wrong kind)") from error
