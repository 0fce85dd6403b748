"""What a call would do, in words, without doing it: for the question before it and for `--dry-run`."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from loragen_agents.assistant.tools.context import Context, ToolError
from loragen_agents.assistant.tools.files import read_text, size_text
from loragen_agents.assistant.tools.store import EntryKind

MAX_LINES = 40


def preview(context: Context, tool: str, arguments: Mapping[str, Any]) -> str:
    """What calling `tool` with `arguments` would do; for files, with what is lost or changed."""
    describe = _PREVIEWS.get(tool)
    if describe is None:
        given = ", ".join(f"{name} = {value!r}" for name, value in arguments.items())
        return f"would call {tool} with {given or 'no arguments'}"
    try:
        return describe(context, arguments)
    except ToolError as error:
        return f"would fail: {error}"
    except KeyError as error:
        return f"would fail: the argument {error} is missing"


def _write(context: Context, arguments: Mapping[str, Any]) -> str:
    file = context.folder.new(arguments["path"])
    return _change(context, file.exists(), arguments["path"], lambda _: arguments["text"])


def _append(context: Context, arguments: Mapping[str, Any]) -> str:
    file = context.folder.new(arguments["path"])
    return _change(
        context, file.exists(), arguments["path"], lambda old: "\n".join([*([old] if old else []), arguments["text"]])
    )


def _change(context: Context, there: bool, path: str, change: Callable[[str], str]) -> str:
    file = context.folder.new(path)
    old = read_text(context.folder, file) if there else ""
    name = context.folder.name(file)
    lines = list(difflib.unified_diff(old.splitlines(), change(old).splitlines(), "now", "then", lineterm="", n=2))[2:]
    more = [f"... and {len(lines) - MAX_LINES} lines more"] if len(lines) > MAX_LINES else []
    return "\n".join([f"would {'change' if there else 'create'} {name}:", *lines[:MAX_LINES], *more])


def _copy(context: Context, arguments: Mapping[str, Any]) -> str:
    file = context.folder.file(arguments["source"])
    target = context.folder.path(arguments["destination"])
    return f"would copy {context.folder.name(file)} to {context.folder.name(target)}"


def _move(context: Context, arguments: Mapping[str, Any]) -> str:
    file = context.folder.file(arguments["source"])
    target = context.folder.path(arguments["destination"])
    return f"would move {context.folder.name(file)} to {context.folder.name(target)}"


def _delete_file(context: Context, arguments: Mapping[str, Any]) -> str:
    file = context.folder.file(arguments["path"])
    return f"would delete {context.folder.name(file)} ({size_text(file.stat().st_size)}) for good"


def _delete_entry(kind: EntryKind) -> Callable[[Context, Mapping[str, Any]], str]:
    def describe(context: Context, arguments: Mapping[str, Any]) -> str:
        return f"would delete the {kind}: {context.store.find(kind, arguments[kind]).text}"

    return describe


_PREVIEWS: dict[str, Callable[[Context, Mapping[str, Any]], str]] = {
    "write_file": _write,
    "append_to_file": _append,
    "copy_file": _copy,
    "move_file": _move,
    "delete_file": _delete_file,
    "delete_note": _delete_entry("note"),
    "delete_task": _delete_entry("task"),
    "delete_reminder": _delete_entry("reminder"),
}
