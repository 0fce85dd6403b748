"""The server with the embedded model: real requests of real clients."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loragen_agents import LoRAGenChatModel
from loragen_agents.models.language_models import LanguageModel
from tests.served import served

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "convert_units",
            "description": "Convert a measured value from one unit to another, such as miles to kilometres.",
            "parameters": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "from_unit": {"type": "string"},
                    "to_unit": {"type": "string"},
                },
                "required": ["value", "from_unit", "to_unit"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "word_count",
            "description": "Count the words of a text file.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        },
    },
]


@pytest.fixture(scope="module")
def client(embedded_model: LanguageModel) -> Iterator[openai.OpenAI]:
    model = LoRAGenChatModel(model=embedded_model, max_tokens=64)
    with served(lambda: model) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def test_a_request_is_answered_by_the_right_call(client):
    # Longer than a pass of 128 tokens: in bf16, beginnings are used again by whole passes.
    before = "I am on a long walk through the hills and the signs show miles. " * 12
    messages: Any = [
        {"role": "user", "content": before},
        {"role": "assistant", "content": "Enjoy your walk."},
        {"role": "user", "content": "Convert 5 miles to kilometres"},
    ]
    whole = client.chat.completions.create(model="loragen-agents", messages=messages, tools=TOOLS)
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "convert_units"
    assert json.loads(call.function.arguments)["value"] == 5
    with client.chat.completions.stream(model="loragen-agents", messages=messages, tools=TOOLS) as stream:
        streamed = stream.get_final_completion()
    (again,) = streamed.choices[0].message.tool_calls
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "8.04672"}
    behind = [*messages, whole.choices[0].message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(model="loragen-agents", messages=behind, tools=TOOLS)
    assert after.usage.prompt_tokens_details.cached_tokens >= 128
