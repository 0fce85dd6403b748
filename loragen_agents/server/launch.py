"""Runs a service under uvicorn: who may reach it, the socket, and a stop that lets running requests end."""

import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from loragen_agents.errors import ServerError
from loragen_agents.server.app import create_app
from loragen_agents.server.guard import LOOPBACK
from loragen_agents.server.service import Service


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse to serve other machines without an API key.

    Raises:
        ServerError: `host` is not on loopback, and there is no key; or the key is not one that a header can carry.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise ServerError("the API key is empty, or not made of printable ASCII characters; choose another one")
    if api_key is None and not _on_loopback(host):
        raise ServerError(
            f"{host} can be reached from other machines, and there is no API key; give one (LORAGEN_AGENTS_API_KEY or "
            "--api-key), or serve on 127.0.0.1"
        )


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ServerError: the address can't be had.
    """
    if not 0 <= port < 2**16:
        raise ServerError(f"there is no port {port}; choose another --port, below {2**16}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        raise ServerError(f"can't serve on {host}, port {port}: {error}; choose another --host or --port") from error
    return listening


def run_server(service: Service, listening: socket.socket, host: str, *, grace_seconds: int = 30) -> None:
    """Serve until SIGINT or SIGTERM. Then nothing new is taken, and what runs has `grace_seconds` to end.

    Args:
        service: what is served; its model is loaded while the server already answers /health.
        listening: from `open_socket`.
        host: the name that was asked for; served without a key beside those of loopback.
        grace_seconds: how long running requests may go on.

    Raises:
        Exception: whatever kept the model from being loaded.
    """
    hosts = LOOPBACK | {f"[{host}]" if ":" in host else host.lower()}
    config = uvicorn.Config(
        create_app(service, hosts),
        log_level="warning",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=grace_seconds,
    )
    server = uvicorn.Server(config)
    failure: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    service.on_failure(failed)
    with listening, _signals_end_here():
        server.run(sockets=[listening])
    if failure:
        raise failure[0]


@contextmanager
def _signals_end_here() -> Iterator[None]:
    """Let a signal stop the server and nothing else: uvicorn sends itself the signal again once it has stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def address(listening: socket.socket) -> str:
    """The URL that OpenAI's clients take as `base_url`."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _on_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
