"""The assistant's own tools as LangChain tools: which there are, in which groups, and which of them ask first.

What the model reads of a tool (name, description, arguments) comes from `tools/assistant.yaml`; what it does comes from
the group's module.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from langchain_core.tools import StructuredTool

from loragen_agents.assistant.results import Result
from loragen_agents.assistant.tools import data, dates, files, images, maths, notes, system
from loragen_agents.assistant.tools.context import Context, ToolError
from loragen_agents.errors import ArgumentError, RegistryError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.registry.arguments import bind_arguments
from loragen_agents.support.content import content_folder

GROUPS: Mapping[str, Callable[[Context], dict[str, Callable[..., Result]]]] = {
    "maths": maths.tools,
    "dates": dates.tools,
    "files": files.tools,
    "notes": notes.note_tools,
    "tasks": notes.task_tools,
    "reminders": notes.reminder_tools,
    "timers": notes.timer_tools,
    "data": data.tools,
    "images": images.tools,
    "system": system.tools,
}
# What changes or deletes something that was there. Other tools read, or add to the assistant's own lists, or put a new
# file beside an old one.
ASK_FIRST = frozenset(
    {
        "write_file",
        "append_to_file",
        "copy_file",
        "move_file",
        "delete_file",
        "delete_note",
        "delete_task",
        "delete_reminder",
    }
)
# What adds something: it runs at once, but not on the word of a file that was read in the same turn.
ADDS = frozenset(
    {
        *("take_note", "add_task", "complete_task", "add_reminder", "start_timer", "cancel_timer"),
        *("crop_image", "resize_image", "rotate_image", "convert_image", "grey_image", "Edge Detection On Image"),
    }
)


class AssistantTool(StructuredTool):
    """One of the assistant's own tools. A class of its own, as a server's tool could claim any metadata.

    Attributes:
        group: what it is switched on and off with.
        asks: whether the user has to say yes to each call.
        adds: whether it leaves something behind that was not there.
    """

    group: str
    asks: bool
    adds: bool


@lru_cache(maxsize=1)
def registry() -> ToolRegistry:
    """All of the assistant's tools as the model knows them."""
    return ToolRegistry.from_yaml(content_folder("tools") / "assistant.yaml")


def all_tools(context: Context) -> dict[str, list[AssistantTool]]:
    """The assistant's tools by group, in the order of the registry file."""
    made: dict[str, list[AssistantTool]] = {}
    for group, functions in GROUPS.items():
        by_name = functions(context)
        made[group] = [langchain_tool(tool, by_name[tool.name], group) for tool in registry() if tool.name in by_name]
    return made


def chosen_tools(context: Context, wanted: Iterable[str] = ()) -> list[AssistantTool]:
    """The tools that `wanted` names, by tool name or group; all of them where it names none.

    Raises:
        RegistryError: there is no such tool or group.
    """
    groups = all_tools(context)
    everything = [tool for group in groups.values() for tool in group]
    names: set[str] = set()
    for word in wanted:
        if word in groups:
            names |= {tool.name for tool in groups[word]}
        elif any(tool.name == word for tool in everything):
            names.add(word)
        else:
            raise RegistryError(f"there is no tool or group {word!r}; the groups are {', '.join(groups)}")
    return [tool for tool in everything if not names or tool.name in names]


def langchain_tool(tool: Tool, function: Callable[..., Result], group: str) -> AssistantTool:
    """A function as a LangChain tool described by `tool`; the `Result` is the artifact beside the model's text."""

    def run(**arguments: Any) -> tuple[str, Result]:
        try:
            given = bind_arguments(tool, json.dumps(arguments), "json")
        except ArgumentError as error:
            raise ToolError(str(error)) from error
        result = function(**given)
        return result.for_model, result

    return AssistantTool(
        name=tool.name,
        description=tool.description,
        args_schema=tool.parameters,
        func=run,
        response_format="content_and_artifact",
        group=group,
        asks=tool.name in ASK_FIRST,
        adds=tool.name in ADDS,
    )
