"""The HTTP routes. What they do is elsewhere: reading in `protocol` and `bodies`, working in `service` and `steps`."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from loragen_agents import __version__
from loragen_agents.server.api_errors import ApiError, api_error
from loragen_agents.server.bodies import read_json
from loragen_agents.server.guard import LOOPBACK, Guard
from loragen_agents.server.protocol import read_chat_request
from loragen_agents.server.replies import DONE, Reply, ascii_json, error_response, server_sent
from loragen_agents.server.service import Service, stopping
from loragen_agents.server.specializations import kept_archive, read_format, read_specialization_request
from loragen_agents.server.steps import Finish
from loragen_agents.server.work_queue import Job, QueueClosed

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
CHAT, SPECIALIZATIONS, MODELS = "/v1/chat/completions", "/v1/specializations", "/v1/models"
HEALTH, METRICS = "/health", "/metrics"


def create_app(service: Service, hosts: frozenset[str] = LOOPBACK) -> FastAPI:
    """The application of a service.

    Args:
        service: what it serves; the app starts it, and closes its queue at the end.
        hosts: names in the Host header that are served without an API key.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.queue.close)

    app = FastAPI(
        title="loragen-agents", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_error)

    _add_figures(app, service)
    _add_chat(app, service)
    _add_specializations(app, service)
    paths = (CHAT, SPECIALIZATIONS, MODELS, HEALTH, METRICS)
    app.add_middleware(Guard, metrics=service.metrics, paths=paths, api_key=service.api_key, hosts=hosts)
    return app


def _add_figures(app: FastAPI, service: Service) -> None:
    """The routes that say what is served and how it stands."""

    @app.get(HEALTH)
    async def health() -> Response:
        """Whether requests are answered."""
        return JSONResponse({"status": "ok"} if service.ready else {"status": "loading"}, 200 if service.ready else 503)

    @app.get(METRICS)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    @app.get(MODELS)
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get(MODELS + "/{name:path}")
    async def model(name: str) -> Response:
        """The model, by its name."""
        service.check_name(name)
        return JSONResponse(_model(service))


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        """The next message of a conversation, as a whole or as a stream."""
        asked = read_chat_request(await read_json(request, service.max_bytes))
        job = service.submit(asked)
        options = asked.stream_options
        reply = Reply(asked.model, f"fp_{__version__}", bool(options and options.include_usage))
        answer = _stream if asked.stream else _whole
        try:
            return await answer(request, service, job, reply)
        except ClientDisconnect:
            service.metrics.cancelled.inc()
            raise
        except Exception as error:
            raise _told(error) from error


def _add_specializations(app: FastAPI, service: Service) -> None:
    @app.post(SPECIALIZATIONS)
    async def make_specialization(request: Request) -> Response:
        """The archive of a specialisation."""
        asked = read_specialization_request(await read_json(request, service.max_bytes))
        job = service.submit(asked)
        try:
            made = await _unless_gone(request, anext(job.events()))
        except ClientDisconnect:
            service.metrics.cancelled.inc()
            raise
        except Exception as error:
            raise _told(error) from error
        finally:
            job.cancel()
        return _archive(made.key, made.content)

    @app.get(SPECIALIZATIONS + "/{key}")
    async def specialization(key: str, format: str = "edge") -> Response:
        """The archive that was made before, by its key."""
        content = await asyncio.to_thread(kept_archive, key, read_format(format))
        if content is None:
            raise ApiError(404, f"there is no specialisation {key[:80]!r}; make it with POST", code="not_found")
        return _archive(key, content)


async def _whole(request: Request, service: Service, job: Job, reply: Reply) -> Response:
    async def read() -> None:
        async for part in job.events():
            reply.add(part)

    try:
        await _unless_gone(request, read())
    finally:
        _settle(service, job, reply.finish)
    return Response(ascii_json(reply.completion()), media_type="application/json")


async def _stream(request: Request, service: Service, job: Job, reply: Reply) -> Response:
    events = job.events()
    try:
        # Until the first part is there, what goes wrong can still be told by the status.
        first = await _unless_gone(request, anext(events))
    except BaseException:
        _settle(service, job, None)
        raise

    async def body() -> AsyncIterator[bytes]:
        for chunk in reply.chunks(first):
            yield server_sent(chunk)
        try:
            async for part in events:
                for chunk in reply.chunks(part):
                    yield server_sent(chunk)
            yield DONE
        except Exception as error:
            yield server_sent(_told(error).body())

    return _EventStream(body(), service, job, reply)


def _settle(service: Service, job: Job, finish: Finish | None) -> None:
    """End a job, whatever became of it, and count its outcome."""
    job.cancel()
    if finish is not None:
        service.metrics.finished(finish, job.wait_seconds)


class _EventStream(StreamingResponse):
    """Server-sent events of a job, which ends with them."""

    media_type = "text/event-stream"

    def __init__(self, body: AsyncIterator[bytes], service: Service, job: Job, reply: Reply) -> None:
        super().__init__(body, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._service, self._job, self._reply = service, job, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._reply.finish is None:
                self._service.metrics.cancelled.inc()
            _settle(self._service, self._job, self._reply.finish)


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, for as long as the client is there.

    Raises:
        ClientDisconnect: it left.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _archive(key: str, content: bytes) -> Response:
    headers = {"X-Specialization": key, "Content-Disposition": f'attachment; filename="{key}.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "loragen-agents"}


def _told(error: BaseException) -> ApiError:
    if isinstance(error, QueueClosed):
        return stopping()
    told = api_error(error)
    if told.status >= 500 and not isinstance(error, ApiError):
        logger.error("A request failed", exc_info=error)
    return told


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(_told(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code="no_such_route")
    told.headers = dict(error.headers or {})
    return error_response(told)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
