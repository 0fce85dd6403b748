"""Whatever a client sends, it gets an answer or an error object, and the server goes on serving others."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loragen_agents import LoRAGenChatModel
from tests.served import served
from tests.tiny_chat import tiny_generator, tiny_language_model

CHAT = "/v1/chat/completions"
FIELDS = (
    *("model", "messages", "tools", "tool_choice", "response_format", "stream", "stream_options", "temperature"),
    *("top_p", "top_k", "max_tokens", "max_completion_tokens", "stop", "seed", "n", "logit_bias", "user", "unheard_of"),
)
INNER = (
    *("role", "content", "name", "tool_calls", "tool_call_id", "id", "type", "function", "arguments", "parameters"),
    *("properties", "required", "enum", "anyOf", "items", "pattern", "description", "json_schema", "schema", "$ref"),
)
WORDS = (
    *("user", "assistant", "tool", "system", "function", "json_schema", "text", "object", "string", "number", "array"),
    *("tiny", "auto", "none", "required", "pick", "#", "<|im_end|>", "\nObservation:", "", "\ud800", "\x00"),
)
scalars = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=8), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(INNER), st.text(max_size=4)), inner, max_size=4),
    ),
    max_leaves=12,
)
PLAIN: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 2,
    "tools": [{"type": "function", "function": {"name": "pick", "description": "Pick.", "parameters": {}}}],
}


@st.composite
def bodies(draw: Any) -> Any:
    """A request that would be answered, with some places in it changed, or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    body = json.loads(json.dumps(PLAIN))
    for _ in range(draw(st.integers(1, 3))):
        body[draw(st.sampled_from(FIELDS))] = draw(values)
    if draw(st.booleans()) and isinstance(body["tools"], list):
        function: dict[str, Any] = {"name": "pick", "description": "Pick."}
        function[draw(st.sampled_from(["name", "description", "parameters", "strict"]))] = draw(values)
        body["tools"] = [{"type": "function", "function": function}]
    if draw(st.booleans()):
        message: dict[str, Any] = {"role": draw(st.sampled_from(WORDS[:4])), "content": "x"}
        message[draw(st.sampled_from(INNER[:5]))] = draw(values)
        body["messages"] = [PLAIN["messages"][0], message, PLAIN["messages"][0]]
    return body


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    edge = tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")
    model = LoRAGenChatModel(model=edge, generator=tiny_generator(edge), max_tokens=4, specialization_cache=False)
    with served(lambda: model) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    # One for all: a client reads the certificates of the whole world when it is made.
    with httpx.Client(timeout=60) as client:
        yield client


def check(answer: httpx.Response) -> None:
    """An answer of the right shape, or an error object that blames the client."""
    if answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies())
@example(body={**PLAIN, "max_tokens": 10**30})
@example(body={**PLAIN, "tools": [{"type": "function", "function": {"name": "a\nb", "description": "x"}}]})
@example(body={**PLAIN, "messages": [{"role": "user", "content": "\ud800"}]})
def test_any_json(url, client, body):
    data = json.dumps(body)
    answer = client.post(url + CHAT, content=data, headers={"Content-Type": "application/json"})
    check(answer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_any_bytes(url, client, body):
    check(client.post(url + CHAT, content=body, headers={"Content-Type": "application/json"}))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 400), stream=st.booleans())
def test_clients_that_are_killed(url, client, cut, stream):
    """A connection that is closed anywhere in the request, or right behind it, harms nobody."""
    body = json.dumps({**PLAIN, "stream": stream})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as cut_off:
        cut_off.sendall(whole[:cut])
    assert client.get(f"{url}/health").status_code == 200


def test_it_still_answers(url, client):
    answer = client.post(url + CHAT, json=PLAIN)
    assert answer.status_code == 200
    assert answer.json()["choices"]
