"""Settings of a wrong kind or range are refused in words that name them, before anything is loaded or decoded."""

import datetime
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from pydantic import ValidationError

from loragen_agents import LoRAGenChatModel, ToolRegistry
from loragen_agents.chat.messages import read_conversation
from loragen_agents.chat.settings import SETTINGS, CallSettings, read_settings, read_tool_choice
from loragen_agents.errors import GrammarError, PromptError, RegistryError

MODEL = LoRAGenChatModel()


def settings(stop: Any = None, **arguments: Any) -> CallSettings:
    return read_settings({name: getattr(MODEL, name) for name in SETTINGS}, arguments, stop, "json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": float("inf")}, "temperature is inf; expected a finite number"),
        ({"temperature": float("nan")}, "temperature is nan; expected a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot'; expected a finite number"),
        ({"max_tokens": 2.5}, r"max_tokens is 2\.5; expected a whole number"),
        ({"max_tokens": True}, "max_tokens is True; expected a whole number"),
        ({"top_k": 1.0}, r"top_k is 1\.0; expected a whole number"),
        ({"top_p": float("nan")}, "top_p is nan; expected a number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected a whole number from"),
        ({"seed": "seven"}, "seed is 'seven'; expected a whole number from"),
        ({"stop": [1]}, "stop holds 1 of type int; expected texts only"),
        ({"stop": 5}, "stop is 5; expected a list of texts"),
        ({"tool_choice": {"function": "x"}}, "tool_choice .* is none of the tools"),
        ({"tool_choice": {"function": {}}}, r"tool_choice is \{'function': \{\}\}; expected"),
        ({"tool_choice": 7}, "tool_choice 7 is none of the tools"),
    ],
)
def test_of_a_call(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        settings(**arguments)


def test_at_the_edges_of_their_ranges() -> None:
    assert settings(seed=2**64 - 1).sampling.seed == 2**64 - 1
    assert settings(seed=-(2**63)).sampling.seed == -(2**63)
    assert settings(stop="END").stop == ("END",)
    assert settings(stop=["a", ""]).stop == ("a",)
    assert read_tool_choice({"function": "find"}, ["find"]) == "find"
    assert settings(score_tools=False).score_tools is False


@pytest.mark.parametrize(
    "fields", [{"temperature": float("inf")}, {"temperature": float("nan")}, {"max_tokens": 2.5}, {"seed": 2**64}]
)
def test_of_the_model(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        LoRAGenChatModel(**fields)


def test_a_model_that_is_none() -> None:
    with pytest.raises(PromptError, match="model is 3; expected a model's name or a LanguageModel"):
        MODEL.invoke("Hello.", model=3)


def never(x: int) -> None:
    """Do nothing."""


def definition(**schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    return {"type": "function", "function": {"name": "odd", "description": "Odd.", "parameters": parameters}}


def test_a_tool_that_no_call_can_be_right_for_is_refused_when_it_is_given() -> None:
    impossible = definition(type="integer", minimum=5, maximum=1)
    with pytest.raises(ValidationError, match=r"tool 'odd'.*argument 'x'"):
        LoRAGenChatModel(tools=[impossible])
    with pytest.raises(GrammarError, match=r"tool 'odd'.*argument 'x'"):
        MODEL.bind_tools([never, impossible])
    with pytest.raises(GrammarError, match=r"tool 'odd'.*argument 'x'"):
        MODEL.bind(tools=[impossible]).invoke("Hello.")
    LoRAGenChatModel(tools=[impossible], grammar=False)
    MODEL.bind_tools([impossible], grammar=False)


def test_what_json_does_not_have_in_a_definition() -> None:
    day = definition(type="string", default=datetime.date(2024, 1, 1))
    with pytest.raises(RegistryError, match=r"tool 'odd'.*type date, which JSON does not have"):
        MODEL.bind(tools=[day]).invoke("Hello.")


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 1), {1, 2}, object()])
@pytest.mark.parametrize("name", ["odd", "unknown"])
def test_what_json_does_not_have_in_the_arguments_of_an_earlier_call(value: Any, name: str) -> None:
    call = {"name": name, "args": {"x": value}, "id": "1", "type": "tool_call"}
    messages = [HumanMessage("Hi"), AIMessage("", tool_calls=[call]), ToolMessage("done", tool_call_id="1")]  # type: ignore[list-item]
    with pytest.raises(
        PromptError, match=rf"message 2: the arguments of the call of '{name}' can't be written as JSON"
    ):
        read_conversation(messages, ToolRegistry.from_tools([definition(type="integer")]))
