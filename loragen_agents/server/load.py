"""Load on a running server: many connections, many registries, every answer compared with the one given alone.

    loragen-agents serve --port 8080
    python -m loragen_agents.server.load http://127.0.0.1:8080

First every pair of registry and request is asked once, one after another; then all of them again and again, from many
connections at a time. Registries are drawn from the tools that ship. Speaks HTTP alone, so any OpenAI-compatible server
can be asked.
"""

import argparse
import json
import random
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from loragen_agents.errors import DataError
from loragen_agents.registry import ToolRegistry
from loragen_agents.support.content import content_folder

REQUESTS = (
    "Convert 5 miles to kilometres",
    "What is 17 times 23?",
    "Which day is it today?",
    "Show me a picture of a red bicycle.",
    "How many days are there between Christmas and the first of March?",
    "Thank you, that was all.",
)
# A server that is busy says 429; that is an answer, and the request is sent again.
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class Ask:
    """A request to one registry."""

    registry: int
    request: str


@dataclass(frozen=True)
class Report:
    """What a run has shown. Times in milliseconds; memory in MiB, None where the server does not tell it."""

    requests: int
    registries: int
    connections: int
    different: int
    lost: int
    busy_answers: int
    seconds: float
    requests_a_second: float
    p50_ms: float
    p95_ms: float
    alone_p50_ms: float
    memory_before_mib: float | None
    memory_after_mib: float | None


class Client:
    """Sends chat requests to one server.

    Args:
        url: the server's address, without /v1.
        api_key: sent with every request, if there is one.
        max_tokens: most tokens of an answer.
    """

    def __init__(self, url: str, api_key: str | None, max_tokens: int) -> None:
        self.url, self.max_tokens = url.rstrip("/"), max_tokens
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.busy = 0

    def ask(self, request: str, tools: Sequence[dict[str, Any]]) -> str:
        """What the model says: its content and calls, without ids and figures.

        Raises:
            DataError: the server can't be reached, or answers with an error.
        """
        messages = [{"role": "user", "content": request}]
        fields = {"model": "loragen-agents", "messages": messages, "tools": list(tools), "max_tokens": self.max_tokens}
        body = json.dumps({**fields, "temperature": 0}).encode()
        while True:
            try:
                answer = json.loads(self._send("/v1/chat/completions", body))
                break
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise DataError(f"{self.url} answers {error.code}: {error.read(500)!r}") from error
                self.busy += 1
                time.sleep(_RETRY_SECONDS)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.url} can't be asked: {error}") from error
        (choice,) = answer["choices"]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        return json.dumps([choice["message"]["content"], calls, choice["finish_reason"]])

    def memory(self) -> float | None:
        """The server's memory in MiB, as its /metrics tell it."""
        try:
            lines = self._send("/metrics", None).decode().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("process_resident_memory_bytes ")]
        return float(found[0]) / 2**20 if found else None

    def _send(self, path: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self.url + path, body, self.headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return bytes(answer.read())


def draw_registries(number: int, size: int = 6, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Different sets of the tools that ship, as OpenAI dicts."""
    tools = [
        tool
        for path in sorted(content_folder("tools").glob("*.yaml"))
        for tool in ToolRegistry.from_yaml(path).to_openai()
    ]
    by_name = {tool["function"]["name"]: tool for tool in tools}
    draw = random.Random(seed)
    return [[by_name[name] for name in draw.sample(sorted(by_name), size)] for _ in range(number)]


def run_load(
    client: Client, registries: Sequence[Sequence[dict[str, Any]]], *, requests: int, connections: int, seed: int = 0
) -> Report:
    """Ask everything alone, then `requests` times from many connections.

    Raises:
        DataError: the server can't be asked at all.
    """
    asks = [Ask(place, request) for place in range(len(registries)) for request in REQUESTS]
    draw = random.Random(seed)
    # No pair is left out, and none comes much more often than the others.
    queue = [*(asks * (requests // len(asks) + 1))][:requests]
    draw.shuffle(queue)
    alone: dict[Ask, str] = {}
    alone_seconds: list[float] = []
    for ask in sorted(set(queue), key=lambda one: one.registry):
        started = time.perf_counter()
        alone[ask] = client.ask(ask.request, registries[ask.registry])
        alone_seconds.append(time.perf_counter() - started)
    before = client.memory()

    def send(ask: Ask) -> tuple[bool | None, float]:
        started = time.perf_counter()
        try:
            same = client.ask(ask.request, registries[ask.registry]) == alone[ask]
        except DataError as error:
            print(error, file=sys.stderr)
            return None, time.perf_counter() - started
        return same, time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        results = list(pool.map(send, queue))
    seconds = time.perf_counter() - started
    times = sorted(spent for _, spent in results)
    return Report(
        requests=len(results),
        registries=len(registries),
        connections=connections,
        different=sum(same is False for same, _ in results),
        lost=sum(same is None for same, _ in results),
        busy_answers=client.busy,
        seconds=round(seconds, 1),
        requests_a_second=round(len(results) / seconds, 2),
        p50_ms=round(statistics.median(times) * 1000, 1),
        p95_ms=round(times[int(0.95 * (len(times) - 1))] * 1000, 1),
        alone_p50_ms=round(statistics.median(alone_seconds) * 1000, 1),
        memory_before_mib=before,
        memory_after_mib=client.memory(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, run, print the report as JSON; 1 when an answer was different or lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="the server's address, such as http://127.0.0.1:8080")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--requests", type=int, default=500, metavar="N")
    parser.add_argument("--registries", type=int, default=20, metavar="N")
    parser.add_argument("--tools", type=int, default=6, metavar="N", help="tools of a registry (6)")
    parser.add_argument("--connections", type=int, default=32, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N")
    arguments = parser.parse_args(argv)
    client = Client(arguments.url, arguments.api_key, arguments.max_tokens)
    registries = draw_registries(arguments.registries, arguments.tools)
    report = run_load(client, registries, requests=arguments.requests, connections=arguments.connections)
    print(json.dumps(asdict(report), indent=2))
    return 1 if report.different or report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
