"""The edge's side of a specialisation service: asked once for each registry and system text, then offline.

What the service gives (see `archives`) is kept in the cache folder. So an edge needs neither a generator nor the cloud
LM, and no network once it has what it was asked for. The service is `loragen-agents serve`.
"""

import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from loragen_agents.errors import CheckpointError, ServiceError
from loragen_agents.models.language_models import LanguageModel, cache_folder
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.archives import MAX_BYTES, read_archive
from loragen_agents.specialization.kept_files import keep, read_kept
from loragen_agents.specialization.shared_values import SharedValues
from loragen_agents.specialization.specialize import MEMORY_ENTRIES, Specialization

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LORAGEN_AGENTS_API_KEY"
# A large registry takes a service without a GPU half a minute, and others may be before us.
_SECONDS = 300

_fetched: SharedValues[tuple[LanguageModel, Specialization]] = SharedValues(MEMORY_ENTRIES)


def is_service(cloud: object) -> bool:
    """Whether what was given as the cloud LM is the address of a service."""
    return isinstance(cloud, str) and cloud.startswith(("http://", "https://"))


def specialize_by_service(
    url: str, registry: ToolRegistry, system_text: str = "", *, edge: LanguageModel, cache: bool = True
) -> Specialization:
    """The edge LM specialised by a service; from memory or disk where it was asked before.

    Args:
        url: the service's address, such as http://cloud.example:8080. The API key is taken from LORAGEN_AGENTS_API_KEY.
        registry, system_text: what to specialise on.
        edge: the edge LM, which has to be the service's.
        cache: False asks in any case and keeps nothing.

    Raises:
        ServiceError: the service can't be reached, or refuses.
        CheckpointError: what it gave is damaged, or for another edge LM.
    """
    parts = [url.rstrip("/"), registry.fingerprint, registry.input_format, system_text, edge.fingerprint]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = cache_folder() / "fetched" / f"{key}.zip"

    def make() -> tuple[LanguageModel, Specialization]:
        if cache and (kept := _kept(path, edge)) is not None:
            return edge, kept
        started = time.perf_counter()
        content = _ask(url.rstrip("/"), registry, system_text, edge)
        made = replace(read_archive(content, edge), source="generated", seconds=time.perf_counter() - started)
        if made.registry.fingerprint != registry.fingerprint or made.system_text != system_text:
            raise CheckpointError(
                f"{url} gave a specialisation on other tools than it was asked for; ask another service"
            )
        if cache:
            keep(path, content)
        return edge, made

    if not cache:
        return make()[1]
    # The value keeps the edge LM, whose id is part of the key, alive.
    (_, made), there = _fetched.get((key, id(edge)), make)
    return replace(made, source="memory", seconds=0.0) if there else made


def forget_fetched() -> None:
    """Let go of the fetched specialisations in memory. Those on disk stay."""
    _fetched.clear()


def _kept(path: Path, edge: LanguageModel) -> Specialization | None:
    content = read_kept(path)
    try:
        return None if content is None else read_archive(content, edge)
    except CheckpointError as error:
        logger.warning("%s: %s It is fetched again.", path, error)
        return None


def _ask(url: str, registry: ToolRegistry, system_text: str, edge: LanguageModel) -> bytes:
    fields = {
        "tools": registry.to_openai(),
        "input_format": registry.input_format,
        "system": system_text,
        "edge_fingerprint": edge.fingerprint,
    }
    headers = {"Content-Type": "application/json"}
    if api_key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {api_key}"
    address = f"{url.removesuffix('/v1')}/v1/specializations"
    try:
        request = urllib.request.Request(address, json.dumps(fields).encode(), headers)
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            content = bytes(answer.read(MAX_BYTES + 1))
    except urllib.error.HTTPError as error:
        raise ServiceError(f"{address} refuses ({error.code}): {_reason(error)}") from error
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"{address} can't be asked ({error}), and nothing is kept from before; check the address and the network"
        ) from error
    if len(content) > MAX_BYTES:
        raise ServiceError(f"{address} gave more than {MAX_BYTES} bytes; ask another service")
    return content


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(100_000))["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
