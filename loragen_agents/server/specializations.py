"""The cloud side: tools and system text to the archive of a specialisation, for edges that can't make it themselves.

There are two archives of each: what this package decodes with ("edge"), and a PEFT folder for other runtimes ("peft").

Archives are kept on disk by their key, so that the same tools are read once, and can be asked for again by it.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loragen_agents.chat.chat_models import LoRAGenChatModel
from loragen_agents.chat.settings import read_registry
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, cache_folder
from loragen_agents.server.api_errors import ApiError, validation_error
from loragen_agents.server.protocol import FunctionDefinition, ToolDefinition
from loragen_agents.specialization.archives import write_archive, write_peft_archive
from loragen_agents.specialization.kept_files import keep, read_kept
from loragen_agents.specialization.specialize import specialize

ArchiveFormat = Literal["edge", "peft"]

_KEY = re.compile(r"[0-9a-f]{64}")


class SpecializationRequest(BaseModel):
    """The body of POST /v1/specializations.

    Attributes:
        edge_fingerprint: of the edge LM that the weights are for, where the client wants that checked.
        format: of the archive.
    """

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    tools: Annotated[list[ToolDefinition], Field(min_length=1)]
    system: str = ""
    input_format: Literal["json", "csv"] = "json"
    edge_fingerprint: str | None = None
    format: ArchiveFormat = "edge"


@dataclass(frozen=True)
class Archive:
    """A specialisation, packed. key: what it is asked for by."""

    key: str
    content: bytes


_FIELDS = frozenset(
    name for model in (SpecializationRequest, ToolDefinition, FunctionDefinition) for name in model.model_fields
)


def read_specialization_request(body: Any) -> SpecializationRequest:
    """Check the body of a request.

    Raises:
        ApiError: status 400, with the first field that is wrong.
    """
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body is no JSON object; expected tools", code="invalid_value")
    try:
        return SpecializationRequest.model_validate(body)
    except ValidationError as error:
        raise validation_error(error, _FIELDS) from error


def read_format(name: str) -> ArchiveFormat:
    """Check the format that a query asks for.

    Raises:
        ApiError: status 400, it is no format.
    """
    if name not in get_args(ArchiveFormat):
        raise ApiError(
            400,
            f"there is no format {name[:80]!r}; expected {' or '.join(get_args(ArchiveFormat))}",
            param="format",
            code="invalid_value",
        )
    return cast(ArchiveFormat, name)


def make_archive(model: LoRAGenChatModel, request: SpecializationRequest, cancel: threading.Event) -> Iterator[Archive]:
    """Specialise as asked, and yield the archive; in a worker's thread.

    Raises:
        ApiError: the client's edge LM is another one (409).
        RegistryError: a tool can't be used.
        GrammarError: its schema can't be turned into a grammar.
    """
    edge, generator = model.model, model.generator
    cloud = edge if model.cloud is None else model.cloud
    # The server loads them before it answers.
    assert isinstance(edge, LanguageModel) and isinstance(cloud, LanguageModel) and isinstance(generator, LoRAGenerator)
    if request.edge_fingerprint not in (None, edge.fingerprint):
        raise ApiError(
            409,
            f"the weights are for {Path(edge.name).name} with the fingerprint {edge.fingerprint}; use that edge LM",
            param="edge_fingerprint",
            code="another_edge_model",
        )
    registry = read_registry([tool.openai() for tool in request.tools], request.input_format)
    made = specialize(registry, request.system, edge=edge, cloud=cloud, generator=generator)
    content = kept_archive(made.key, request.format)
    if content is None and not cancel.is_set():
        content = (write_archive if request.format == "edge" else write_peft_archive)(made, edge)
        keep(_path(made.key, request.format), content)
    if content is not None:
        yield Archive(made.key, content)


def kept_archive(key: str, form: ArchiveFormat) -> bytes | None:
    """The archive with this key; None when there is none."""
    if not _KEY.fullmatch(key):
        return None
    return read_kept(_path(key, form))


def _path(key: str, form: ArchiveFormat) -> Path:
    return cache_folder() / "archives" / f"{key}-{form}.zip"
