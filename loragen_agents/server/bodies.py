"""Reading a request's body: bounded in size, depth and time, so that no client can hold up the others."""

import json
from typing import Any, NoReturn

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from loragen_agents.server.api_errors import ApiError

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 64
READ_SECONDS = 30.0
# A client hears of an error only if what it sends is taken off the wire; more than this is not.
_DRAINED_BYTES = 64 * 2**20
# Parsing more than this would be felt by other clients if it were done between their requests.
_SMALL = 64 * 2**10


async def read_json(request: Request, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON value of a request's body.

    Raises:
        ApiError: no JSON (400), nested too deep (400), sent too slowly (408), too large (413), of another type (415).
        starlette.requests.ClientDisconnect: the client left before the end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Pages that a browser shows can send other types to any server without asking, this one not.
    if kind != "application/json":
        raise ApiError(415, f"the body is {kind or 'of no type'}; send it with Content-Type: application/json")
    received = bytearray()
    length = 0
    try:
        with anyio.fail_after(READ_SECONDS):
            async for part in request.stream():
                length += len(part)
                if length <= max_bytes:
                    received += part
                elif length > _DRAINED_BYTES:
                    break
    except TimeoutError as error:
        raise ApiError(
            408, f"the body did not arrive within {READ_SECONDS:g} seconds", headers={"Connection": "close"}
        ) from error
    if length > max_bytes:
        raise ApiError(
            413,
            f"the body is larger than {max_bytes / 2**20:g} MiB; shorten the conversation",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    return await run_in_threadpool(_parse, bytes(received)) if length > _SMALL else _parse(bytes(received))


def _parse(body: bytes) -> Any:
    try:
        value = json.loads(body, parse_constant=_refuse)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    level, depth = [value], 0
    while level := [inner for item in level for inner in _children(item)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
    return value


def _children(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels; make it flatter", code="invalid_json")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
