"""What a server is made of, and where it stands: the model once it is loaded, the queue, the figures."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from loragen_agents.chat.chat_models import LoRAGenChatModel
from loragen_agents.server.api_errors import ApiError
from loragen_agents.server.bodies import MAX_BYTES
from loragen_agents.server.metrics import Metrics
from loragen_agents.server.protocol import ChatRequest
from loragen_agents.server.specializations import SpecializationRequest, make_archive
from loragen_agents.server.steps import run_request
from loragen_agents.server.work_queue import Job, QueueClosed, QueueFull, Run, WorkQueue
from loragen_agents.specialization.specialize import specializations_in_memory

logger = logging.getLogger(__name__)

# A name for clients that should not have to know which model is behind the server.
ALIAS = "loragen-agents"


class Service:
    """A server without its HTTP.

    Args:
        name: the model's name for clients.
        load: loads the model; called once, in a thread of its own, by `start`.
        queue: where requests wait.
        api_key: what clients have to show; None for no key.
        max_bytes: largest body that is read.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], LoRAGenChatModel],
        *,
        queue: WorkQueue,
        api_key: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.name, self.queue, self.api_key, self.max_bytes = name, queue, api_key, max_bytes
        self.metrics = Metrics()
        self.metrics.waiting.set_function(lambda: self.queue.waiting)
        self.metrics.kept.set_function(lambda: specializations_in_memory()[0])
        self.metrics.kept_bytes.set_function(lambda: specializations_in_memory()[1])
        self.metrics.running.set_function(lambda: self.queue.running)
        self.created = int(time.time())
        self.model: LoRAGenChatModel | None = None
        self._load = load
        self._failed: Callable[[BaseException], None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.model is not None

    def on_failure(self, tell: Callable[[BaseException], None]) -> None:
        """Have `tell` called with the error when the model can't be loaded."""
        self._failed = tell

    def start(self) -> None:
        """Begin to load the model."""
        threading.Thread(target=self._start, name="loragen-load", daemon=True).start()

    def _start(self) -> None:
        try:
            self.model = self._load()
        except BaseException as error:
            if self._failed is None:
                raise
            self._failed(error)

    def submit(self, request: ChatRequest | SpecializationRequest) -> Job:
        """Queue a request; call it on the event loop.

        Raises:
            ApiError: there is no such model (404), too many requests wait (429), the server is loading or stopping
                (503).
        """
        if isinstance(request, ChatRequest):
            self.check_name(request.model)
        if self.model is None:
            raise ApiError(
                503,
                "the model is being loaded; try again in a few seconds",
                kind="server_error",
                code="loading",
                headers={"Retry-After": "2"},
            )
        run: Run
        if isinstance(request, ChatRequest):
            run = partial(run_request, self.model, request)
        else:
            run = partial(make_archive, self.model, request)
        try:
            return self.queue.submit(run)
        except QueueFull as error:
            raise ApiError(
                429,
                f"the server is busy: {error}; try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from error
        except QueueClosed as error:
            raise stopping() from error

    def check_name(self, name: str) -> None:
        """Check that a model of this name is served.

        Raises:
            ApiError: status 404.
        """
        if name not in (self.name, ALIAS):
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; expected {self.name!r} or {ALIAS!r}",
                param="model",
                code="model_not_found",
            )


def stopping() -> ApiError:
    """The error of requests that the server can't answer because it stops."""
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")
