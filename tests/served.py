"""A server on loopback for the length of a test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from loragen_agents import LoRAGenChatModel
from loragen_agents.server.app import create_app
from loragen_agents.server.launch import address, open_socket
from loragen_agents.server.service import Service
from loragen_agents.server.work_queue import WorkQueue


@contextmanager
def served(
    load: Callable[[], LoRAGenChatModel], *, workers: int = 1, waiting: int = 64, wait: bool = True, **options: Any
) -> Iterator[tuple[str, Service]]:
    """Serve the model that `load` gives, as "tiny"; gives the URL without `/v1`, and the service."""
    service = Service("tiny", load, queue=WorkQueue(workers, waiting), **options)
    listening = open_socket("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service), log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = address(listening).removesuffix("/v1")
    try:
        deadline = time.monotonic() + 60
        while not server.started or (wait and httpx.get(f"{url}/health").status_code != 200):
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield url, service
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"
