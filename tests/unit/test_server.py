"""The server on loopback with a tiny random model: what it says must have OpenAI's shape, whatever the model says."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from loragen_agents import LoRAGenChatModel
from loragen_agents.errors import ServerError
from loragen_agents.server.launch import check_exposure, open_socket
from loragen_agents.server.service import Service
from tests.served import served
from tests.tiny_chat import tiny_generator, tiny_language_model

PICK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Pick a number and a colour.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"const": 3}, "colour": {"const": "red"}},
            "required": ["number", "colour"],
        },
    },
}
WRITE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "write",
        "description": "Write a text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}
CHOOSE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "choose",
        "description": "Choose a number and a colour.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"enum": [1, 2]}, "colour": {"enum": ["red", "blue"]}},
            "required": ["number", "colour"],
        },
    },
}
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
HALF = "\r\n".join(
    [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 100", "", "{"]
).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoRAGenChatModel:
    edge = tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")
    return LoRAGenChatModel(model=edge, generator=tiny_generator(edge), max_tokens=64)


@pytest.fixture(scope="module")
def server(model) -> Iterator[tuple[str, Service]]:
    with served(lambda: model, workers=2) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    # Without TLS: reading the certificates of the whole world takes longer than most tests here.
    with httpx.Client(base_url=server[0], timeout=60, verify=False) as client:
        yield client


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, **fields}


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer(client, model):
    reply = client.post(CHAT, json=asked(max_tokens=8)).json()
    (choice,) = reply["choices"]
    message = model.invoke("Hello", max_tokens=8)
    assert choice["message"] == {"role": "assistant", "content": message.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    usage = message.usage_metadata
    assert reply["usage"]["prompt_tokens"] == usage["input_tokens"]
    assert reply["usage"]["completion_tokens"] == usage["output_tokens"]
    assert reply["usage"]["total_tokens"] == usage["total_tokens"]
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    assert reply["loragen_agents"]["definition_tokens"] > 0


def test_a_prompt_that_was_read_is_counted_as_cached(client):
    request = asked(messages=[{"role": "user", "content": "Tell me a long story"}], max_tokens=32)
    first, again = (client.post(CHAT, json=request).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < first["prompt_tokens"] - 1
    assert again["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - 1


def test_a_call(client):
    reply = client.post(CHAT, json=asked(tools=[PICK, WRITE], tool_choice=_named("pick"))).json()
    (choice,) = reply["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert (call["type"], call["function"]["name"]) == ("function", "pick")
    assert json.loads(call["function"]["arguments"]) == {"number": 3, "colour": "red"}


@pytest.mark.parametrize(
    ("choice", "called"), [("required", True), ("none", False), (None, None), ("auto", None)], ids=str
)
def test_tool_choice(client, choice, called):
    fields = asked(tools=[PICK], tool_choice=choice)
    (chosen,) = client.post(CHAT, json=fields).json()["choices"]
    if called is not None:
        assert ("tool_calls" in chosen["message"]) == called
    assert (chosen["finish_reason"] == "tool_calls") == ("tool_calls" in chosen["message"])


def test_a_streamed_call(client):
    request = asked(tools=[CHOOSE], tool_choice="required", stream=True, stream_options={"include_usage": True})
    answer = client.post(CHAT, json=request)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage = events(answer.text)
    (first,) = chunks[0]["choices"]
    (head,) = first["delta"]["tool_calls"]
    assert head.pop("id").startswith("call_")
    assert head == {"index": 0, "type": "function", "function": {"name": "choose", "arguments": ""}}
    fragments = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks[1:]]
    assert len(fragments) > 1
    assert all(fragment.keys() == {"index", "function"} for fragment in fragments)
    text = "".join(fragment["function"]["arguments"] for fragment in fragments)
    assert json.loads(text)["number"] in (1, 2)
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["choices"][0]["delta"] == {}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert len({chunk["id"] for chunk in [*chunks, last, usage]}) == 1


def test_a_streamed_answer_is_the_whole_one(client):
    whole = client.post(CHAT, json=asked()).json()["choices"][0]
    chunks = events(client.post(CHAT, json=asked(stream=True)).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_call_that_is_cut_off(client):
    request = asked(tools=[WRITE], tool_choice="required", max_completion_tokens=12)
    (choice,) = client.post(CHAT, json=request).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_sampling_goes_by_the_seed(client):
    def text(**fields: Any) -> str:
        return client.post(CHAT, json=asked(temperature=1.5, max_tokens=16, **fields)).json()["choices"][0]["message"][
            "content"
        ]

    assert text(seed=5) == text(seed=5)
    assert len({text(seed=seed) for seed in range(4)}) > 1


def test_stop_texts_end_an_answer(client):
    whole = client.post(CHAT, json=asked()).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:2]
    for given in (stop, [stop]):
        (choice,) = client.post(CHAT, json=asked(stop=given)).json()["choices"]
        assert choice["message"]["content"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_system_messages_take_no_prompt_tokens(client):
    bare = client.post(CHAT, json=asked(max_tokens=2)).json()
    system = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Always."}, *HELLO]
    held = client.post(CHAT, json=asked(messages=system, max_tokens=2)).json()
    assert held["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"]
    assert held["loragen_agents"]["definition_tokens"] != bare["loragen_agents"]["definition_tokens"]


def test_tools_are_specialised_once(client):
    fields = asked(tools=[{**WRITE, "function": {**WRITE["function"], "name": "write_once"}}], max_tokens=2)
    sources = [client.post(CHAT, json=fields).json()["loragen_agents"]["specialization"] for _ in range(2)]
    assert sources == ["generated", "memory"]


SCHEMA = {"type": "object", "properties": {"size": {"const": 7}, "ok": {"type": "boolean"}}, "required": ["size", "ok"]}
SHAPED = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [None, [PICK]])
def test_an_answer_that_fits_a_schema(client, stream, tools):
    fields = asked(response_format=SHAPED, stream=stream, tools=tools, tool_choice="none" if tools else None)
    answer = client.post(CHAT, json=fields)
    if stream:
        chunks = events(answer.text)
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        assert "tool_calls" not in choice["message"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    value = json.loads(text)
    assert value["size"] == 7
    assert isinstance(value["ok"], bool)
    assert reason == "stop"


@pytest.mark.parametrize("calls", [True, False])
def test_tools_and_a_schema(client, model, monkeypatch, calls):
    """Where both are given, a call is a call and an answer fits the schema."""
    monkeypatch.setattr(model, "tool_choice", "auto")
    given = LoRAGenChatModel.steps

    def steps(self: Any, messages: Any, stop: Any, cancel: Any, **kwargs: Any) -> Any:
        if kwargs["tool_choice"] == "auto":
            kwargs["tool_choice"] = "any" if calls else "none"
        return given(self, messages, stop, cancel, **kwargs)

    monkeypatch.setattr(LoRAGenChatModel, "steps", steps)
    (choice,) = client.post(CHAT, json=asked(tools=[PICK], response_format=SHAPED)).json()["choices"]
    if calls:
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "pick"
    else:
        assert json.loads(choice["message"]["content"])["size"] == 7


def test_any_json_object(client):
    (choice,) = client.post(CHAT, json=asked(response_format={"type": "json_object"})).json()["choices"]
    assert choice["message"]["content"].startswith("{")


def test_a_conversation_with_a_call(client):
    call = {"id": "c1", "type": "function", "function": {"name": "write", "arguments": '{"text": "x"}'}}
    broken = {"id": "c2", "type": "function", "function": {"name": "write", "arguments": '{"text": '}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "not JSON"}]},
    ]
    reply = client.post(CHAT, json=asked(messages=messages, tools=[WRITE], max_tokens=4)).json()
    assert reply["usage"]["prompt_tokens"] > 40


def test_models(client):
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == listed
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_metrics(client):
    client.post(CHAT, json=asked(max_tokens=2))
    client.get("/nothing/here")
    text = client.get("/metrics").text
    assert 'loragen_http_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert 'loragen_http_requests_total{path="other",status="404"}' in text
    assert 'loragen_tokens_total{kind="generated"}' in text
    assert "loragen_queue_waiting 0.0" in text
    assert "nothing" not in text


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hello"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "needs content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": "x", "color": 1}]}, "messages[0].color", "unknown field"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "nothing to answer"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, None, "no such call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "reads text only"),
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"\ud800": 1}, None, "valid string"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"n": 2}, "n", "one choice"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"functions": [{}]}, "functions", "given as tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"stop": ["a"] * 5}, "stop", "at most four"),
        ({"stream_options": {}, "stream": False}, None, "stream: true"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [PICK], "tool_choice": _named("roll")}, None, "none of the tools"),
        ({"tool_choice": "required"}, None, "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "tools", "description is empty"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "goes with"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}},
            "response_format.json_schema.schema",
            "an object at the top",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_cannot_be(client, fields, param, said, stream):
    body = json.dumps({**asked(), "stream": stream, **fields})
    answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"\xff", "application/json", 400, "no JSON"),
        (b"[" * 100_000, "application/json", 400, "nested deeper"),
        (b"[" * 80 + b"]" * 80, "application/json", 400, "nested deeper"),
        (b'{"model": NaN}', "application/json", 400, "NaN"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400, "no JSON"),
        (b"[]", "application/json", 400, "no JSON object"),
        (b"{}", "text/plain", 415, "application/json"),
        (b'{"messages": "' + b"x" * 10_000_000 + b'"}', "application/json", 413, "larger than 4 MiB"),
    ],
    ids=["half", "bytes", "deep", "nested", "nan", "digits", "list", "type", "large"],
)
def test_bodies_that_cannot_be(client, content, kind, status, said):
    answer = client.post(CHAT, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", CHAT, 405), ("PUT", "/health", 405)])
def test_routes_that_are_not(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == "no_such_route"


def test_another_model(client):
    body = json.dumps({**asked(), "model": "gpt-\ud800"})
    answer = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert client.post(CHAT, json={**asked(max_tokens=1), "model": "loragen-agents"}).status_code == 200


def test_a_body_that_never_ends(client, server, monkeypatch):
    monkeypatch.setattr("loragen_agents.server.bodies.READ_SECONDS", 0.2)
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(HALF)
        answer = b"".join(iter(lambda: half.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive" in answer
    with socket.create_connection((host, int(port))) as half:
        half.sendall(HALF)
    assert client.post(CHAT, json=asked(max_tokens=1)).status_code == 200


def test_the_key(model):
    with served(lambda: model, api_key="secret") as (url, _):
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == 401
        held = {"Authorization": "Bearer secret", "Host": "any.example"}
        assert httpx.get(f"{url}/v1/models", headers=held).status_code == 200


def test_names_that_a_page_in_a_browser_could_use(client):
    assert client.get("/v1/models", headers={"Host": "evil.example:80"}).json()["error"]["code"] == "unknown_host"
    assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_other_machines_need_a_key():
    for host in ("0.0.0.0", "::", "192.168.0.4", "example.org"):
        with pytest.raises(ServerError, match="there is no API key"):
            check_exposure(host, None)
        check_exposure(host, "secret")
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_exposure(host, None)
    for key in ("", " x", "schlüssel"):
        with pytest.raises(ServerError, match="choose another"):
            check_exposure("0.0.0.0", key)


def test_a_port_that_is_taken():
    with open_socket("127.0.0.1", 0) as first, pytest.raises(ServerError, match="choose another"):
        open_socket("127.0.0.1", first.getsockname()[1])


def test_while_the_model_is_loaded(model):
    go = threading.Event()

    def load() -> LoRAGenChatModel:
        go.wait(10)
        return model

    with served(load, wait=False) as (url, _):
        assert httpx.get(f"{url}/health").status_code == 503
        answer = httpx.post(url + CHAT, json=asked())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        go.set()
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline
        assert httpx.post(url + CHAT, json=asked(max_tokens=1), timeout=30).status_code == 200


class _Held:
    """Makes every request wait for `go` before it is decoded, and counts those that began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        self.cancels: list[threading.Event] = []
        given = LoRAGenChatModel.steps

        def steps(model: Any, messages: Any, stop: Any, cancel: Any, **kwargs: Any) -> Any:
            self.cancels.append(cancel)
            self.begun.release()
            while not (self.go.wait(0.01) or cancel.is_set()):
                pass
            yield from given(model, messages, stop, cancel, **kwargs)

        monkeypatch.setattr(LoRAGenChatModel, "steps", steps)


def test_more_requests_than_may_wait(model, monkeypatch):
    held = _Held(monkeypatch)
    with served(lambda: model, waiting=2) as (url, service), ThreadPoolExecutor(8) as pool:

        def ask() -> httpx.Response:
            return httpx.post(url + CHAT, json=asked(max_tokens=1), timeout=60)

        first = pool.submit(ask)
        assert held.begun.acquire(timeout=10)
        waiting = [pool.submit(ask) for _ in range(2)]
        _until(lambda: service.queue.waiting == 2)
        refused = ask()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        held.go.set()
        assert [one.result().status_code for one in (first, *waiting)] == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(model, monkeypatch, stream):
    held = _Held(monkeypatch)
    with served(lambda: model, waiting=1) as (url, service):
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + CHAT, json=asked(stream=stream), timeout=0.2)
        _until(lambda: service.queue.running == 0 and service.queue.waiting == 0)
        assert held.cancels
        assert all(cancel.is_set() for cancel in held.cancels)
        held.go.set()
        assert httpx.post(url + CHAT, json=asked(max_tokens=1), timeout=30).status_code == 200
        _until(lambda: "loragen_cancelled_total 3.0" in httpx.get(f"{url}/metrics").text)


def test_a_client_that_leaves_a_stream_stops_the_decoding(model, server):
    url, service = server
    with httpx.stream("POST", url + CHAT, json=asked(stream=True, max_tokens=1500), timeout=30) as answer:
        next(answer.iter_lines())
        assert service.queue.running == 1
    started = time.monotonic()
    _until(lambda: service.queue.running == 0)
    assert time.monotonic() - started < 5


def test_a_stop_ends_what_runs_and_refuses_what_waits(model, monkeypatch):
    held = _Held(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        with served(lambda: model) as (url, service):
            asks = [pool.submit(httpx.post, url + CHAT, json=asked(max_tokens=2), timeout=60) for _ in range(2)]
            assert held.begun.acquire(timeout=10)
            _until(lambda: service.queue.waiting == 1)
            threading.Timer(0.3, held.go.set).start()
        # The grace of a stop was long enough for both.
        assert [ask.result().status_code for ask in asks] == [200, 200]


def test_what_fails_inside_is_an_error_object(client, monkeypatch):
    def steps(*_: Any, **__: Any) -> Any:
        raise KeyError("/home/secret")
        yield

    monkeypatch.setattr(LoRAGenChatModel, "steps", steps)
    answer = client.post(CHAT, json=asked())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_what_fails_in_a_stream_is_told_in_it(client, monkeypatch):
    given = LoRAGenChatModel.steps

    def steps(*arguments: Any, **kwargs: Any) -> Any:
        yield next(iter(given(*arguments, **kwargs)))
        raise KeyError("inside")

    monkeypatch.setattr(LoRAGenChatModel, "steps", steps)
    answer = client.post(CHAT, json=asked(stream=True))
    assert answer.status_code == 200
    *_, last = [line for line in answer.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def _until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
