"""What stands in front of every route: the API key, the check of the Host header, and the counting of answers."""

import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loragen_agents.server.api_errors import ApiError
from loragen_agents.server.metrics import Metrics
from loragen_agents.server.replies import error_response

# Asked by load balancers and supervisors, which have no key; it says nothing but whether the server is ready.
_OPEN = frozenset({"/health"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands in front of.
        metrics: counts the answers.
        paths: the routes there are; all other paths are counted together.
        api_key: asked for as `Authorization: Bearer KEY`; None asks for none.
        hosts: names in the Host header that are served without a key. A page in a browser can reach a server on
            loopback by a name of its own (DNS rebinding), and is told apart by it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: Collection[str],
        api_key: str | None,
        hosts: Collection[str] = LOOPBACK,
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        self._key = None if api_key is None else api_key.encode()
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 499  # the client left before an answer

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, counting)
            else:
                await error_response(refusal)(scope, receive, counting)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._key is None:
            host = headers.get("host", "").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self._hosts:
                return ApiError(403, "this name of the server is not served without an API key", code="unknown_host")
            return None
        if scope["path"] in _OPEN:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key):
            return None
        return ApiError(
            401,
            "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
