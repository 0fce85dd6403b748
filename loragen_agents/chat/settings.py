"""The settings of one call of the chat model: its fields, or the arguments of the call in their place.

Knows the forms in which LangChain and OpenAI give tools and choices; knows neither messages nor weights.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loragen_agents.edge.grammar_source import grammar_source
from loragen_agents.edge.sampling import Sampling
from loragen_agents.errors import PromptError, RegistryError
from loragen_agents.registry import InputFormat, ToolRegistry

SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed")
SETTINGS = ("model", "tools", "tool_choice", "grammar", "score_tools", *SAMPLING)
# Calls always fit their schema and come one at a time, whatever the first two say; `stream` is LangChain's own.
_TOLERATED = ("strict", "parallel_tool_calls", "stream")


@dataclass(frozen=True)
class CallSettings:
    """The settings of one call.

    Args:
        model: the edge LM or its name.
        registry: the tools.
        tool_choice: "auto", "any", "none" or a tool's name.
        grammar: whether decoding is held to the registry's grammar.
        score_tools: whether the tool is chosen by the scores of all of them.
        sampling: how tokens are chosen.
        stop: texts that end an answer.
    """

    model: Any
    registry: ToolRegistry
    tool_choice: str
    grammar: bool
    score_tools: bool
    sampling: Sampling
    stop: tuple[str, ...]


def read_settings(
    fields: Mapping[str, Any], arguments: Mapping[str, Any], stop: Sequence[str] | None, input_format: InputFormat
) -> CallSettings:
    """The settings of a call.

    Args:
        fields: a value for each of `SETTINGS`.
        arguments: those of the call, which take the place of fields; None counts as not given.
        stop: texts that end an answer.
        input_format: how the tools' inputs are written.

    Raises:
        PromptError: an argument that the model does not know, one of the wrong kind or outside its range, or a tool
            choice that the tools do not allow.
        RegistryError: a tool that can't be used.
        GrammarError: a tool that no call can be right for, where the grammar is on.
    """
    unknown = sorted(arguments.keys() - {*SETTINGS, *_TOLERATED})
    if unknown:
        raise PromptError(f"unknown arguments of the call: {', '.join(unknown)}; expected {', '.join(SETTINGS)}")
    given = {name: fields[name] if arguments.get(name) is None else arguments[name] for name in SETTINGS}
    registry = read_registry(given["tools"], input_format)
    choice = read_tool_choice(given["tool_choice"], registry.names)
    if choice not in ("auto", "none") and not len(registry):
        raise PromptError(f"tool_choice is {choice!r}, and there are no tools; bind some or use 'auto'")
    if choice != "auto" and not given["grammar"]:
        raise PromptError(f"tool_choice {choice!r} is held by the grammar, which is off; switch it on or use 'auto'")
    try:
        sampling = Sampling(**{name: given[name] for name in SAMPLING})
    except (TypeError, ValueError) as error:
        raise PromptError(str(error)) from error
    if given["grammar"]:
        grammar_source(registry, "auto")
    return CallSettings(
        model=given["model"],
        registry=registry,
        tool_choice=choice,
        grammar=bool(given["grammar"]),
        score_tools=bool(given["score_tools"]),
        sampling=sampling,
        stop=_read_stop(stop),
    )


def _read_stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping):
        raise PromptError(f"stop is {stop!r}; expected a list of texts")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise PromptError(f"stop holds {text!r} of type {type(text).__name__}; expected texts only")
    return tuple(text for text in texts if text)


def read_registry(tools: Any, input_format: InputFormat) -> ToolRegistry:
    """The registry of `tools`, which are OpenAI dicts or any other form that `ToolRegistry.from_tools` takes.

    Raises:
        RegistryError: a tool that can't be used.
    """
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        with suppress(TypeError, ValueError):  # what JSON can't hold is named below
            return _registry(json.dumps(tools), input_format)
    return _registry(json.dumps(openai_dicts(tools)), input_format)


@lru_cache(maxsize=64)
def _registry(definitions: str, input_format: InputFormat) -> ToolRegistry:
    # Checking the schemas of 20 tools takes longer than a prompt does, and agents bind the same tools at every step.
    return ToolRegistry.from_tools(openai_dicts(json.loads(definitions)), input_format=input_format)


def openai_dicts(tools: Any) -> list[dict[str, Any]]:
    """Tools of any make as OpenAI dicts; of definitions that are equal but for their titles, the first.

    Raises:
        RegistryError: a tool that can't be used, or two different ones of one name.
    """
    if tools is None:
        return []
    if isinstance(tools, ToolRegistry):
        return tools.to_openai()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise RegistryError(f"tools is a {type(tools).__name__}; expected a list of tools or a ToolRegistry")
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        (definition,) = ToolRegistry.from_tools([tool]).to_openai()
        name = definition["function"]["name"]
        if name in found and _without_titles(found[name]) != _without_titles(definition):
            raise RegistryError(f"tool {name!r}: two different tools have this name; rename one")
        found.setdefault(name, definition)
    return list(found.values())


def _without_titles(node: Any) -> Any:
    """A JSON Schema without the titles that pydantic adds; a property called title, whose value is a schema, stays."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {k: _without_titles(v) for k, v in node.items() if not (k == "title" and isinstance(v, str))}


def read_tool_choice(choice: Any, names: Sequence[str] | None) -> str:
    """LangChain's and OpenAI's ways to choose, as "auto", "any", "none" or a tool's name.

    Args:
        choice: a name or word, True ("any"), False ("none"), None ("auto"), or a dict as OpenAI or Anthropic has it.
        names: the tools there are; None where that is not known yet.

    Raises:
        PromptError: the choice is none of these, or a name that is not in `names`.
    """
    given = choice
    if isinstance(choice, Mapping):
        inner = choice.get("function", choice)
        choice = (inner.get("name") or inner.get("type")) if isinstance(inner, Mapping) else inner
        if not isinstance(choice, str):
            raise PromptError(f"tool_choice is {given!r}; expected {{'type': 'function', 'function': {{'name': ...}}}}")
    if choice is None or isinstance(choice, bool):
        return {None: "auto", True: "any", False: "none"}[choice]
    if choice == "required":
        return "any"
    if choice in ("auto", "any", "none") or (isinstance(choice, str) and (names is None or choice in names)):
        return str(choice)
    raise PromptError(
        f"tool_choice {given!r} is none of the tools ({', '.join(names or ()) or 'there are none'}); expected one of "
        "their names, 'auto', 'any' or 'none'"
    )
