"""Clients that people have, against the server on loopback: openai, LangChain's ChatOpenAI and a pydantic-ai agent."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from loragen_agents import LoRAGenChatModel
from tests.served import served
from tests.tiny_chat import tiny_generator, tiny_language_model

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


class Report(BaseModel):
    """A report."""

    size: Literal[7]
    colour: Literal["red"]


def pick(number: Literal[3]) -> str:
    """Pick a number."""
    return f"picked {number}"


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "pick",
            "description": "Pick a number.",
            "parameters": {"type": "object", "properties": {"number": {"const": 3}}, "required": ["number"]},
            "strict": True,
        },
    }
]


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    edge = tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")
    model = LoRAGenChatModel(model=edge, generator=tiny_generator(edge), max_tokens=48)
    with served(lambda: model, api_key="secret") as (url, _):
        yield f"{url}/v1"


@pytest.fixture
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        yield client


def test_openai(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    call = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="required")
    (made,) = call.choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("pick", {"number": 3})
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_streams(client):
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="required", stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"number": 3}
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.usage.completion_tokens > 0


def test_openai_parses_an_answer(client):
    parsed = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Report)
    assert parsed.choices[0].message.parsed == Report(size=7, colour="red")


def test_openai_reads_the_errors(client, url):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=[], temperature=0)
    assert refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with (
        openai.OpenAI(base_url=url, api_key="other", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def test_openai_async(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        whole = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3


@pytest.fixture
def langchain(url) -> ChatOpenAI:
    return ChatOpenAI(model="tiny", base_url=url, api_key=SecretStr("secret"), max_retries=0, stream_usage=True)


@pytest.fixture
def first_picks(monkeypatch) -> None:
    """The tiny model decides by chance. Here it picks a number, and is done once it has the result."""
    given = LoRAGenChatModel.steps

    def steps(model: Any, messages: Any, stop: Any, cancel: Any, **kwargs: Any) -> Any:
        picked = any(isinstance(message, ToolMessage) for message in messages)
        names = [tool["function"]["name"] for tool in kwargs["tools"]]
        last = next((name for name in names if name != "pick"), "none")
        return given(model, messages, stop, cancel, **{**kwargs, "tool_choice": last if picked else "pick"})

    monkeypatch.setattr(LoRAGenChatModel, "steps", steps)


def test_langchain(langchain):
    bound = langchain.bind_tools([pick], tool_choice="any")
    call = bound.invoke("Hello")
    assert [(made["name"], made["args"]) for made in call.tool_calls] == [("pick", {"number": 3})]
    result = ToolMessage("picked 3", tool_call_id=call.tool_calls[0]["id"])
    assert langchain.bind_tools([pick], tool_choice="none").invoke([HumanMessage("Hello"), call, result]).text
    first, *rest = bound.stream("Hello")
    whole: Any = first
    for chunk in rest:
        whole = whole + chunk
    assert whole.tool_calls[0]["args"] == {"number": 3}
    assert whole.usage_metadata["output_tokens"] == call.usage_metadata["output_tokens"]
    assert langchain.with_structured_output(Report).invoke("Hello") == Report(size=7, colour="red")


async def test_langchain_agent(langchain, first_picks):
    agent = create_agent(langchain, tools=[pick], system_prompt="Be brief.")
    result = await agent.ainvoke({"messages": [HumanMessage("Hello")]})
    assert [message.type for message in result["messages"]] == ["human", "ai", "tool", "ai"]
    assert result["messages"][2].content == "picked 3"


async def test_pydantic_ai(url, first_picks):
    picked = []
    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="secret"))
    agent = Agent(model, system_prompt="Be brief.", output_type=Report)

    @agent.tool_plain
    def pick(number: Literal[3]) -> str:
        """Pick a number."""
        picked.append(number)
        return f"picked {number}"

    result = await agent.run("Hello")
    assert result.output == Report(size=7, colour="red")
    assert picked == [3]
    assert result.usage.requests == 2
