"""GPT4Tools' own files, read and written: gpt4tools_71k.json, gpt4tools_val_seen.json, gpt4tools_test_unseen.json.

A file is a JSON list of `{"instruction", "input", "output"}`, the evaluation files with an `"id"` besides.
`instruction` is the whole prompt. It is split into what LoRA-Gen compresses, the tool definitions and the step format,
and the user turn: the conversation so far, the request, and the steps that were taken. Wording that only frames these
(the role, the file name rules, the closing paragraph) belongs to the prompt templates and is left out.

Knows the file format and registries; no tokens, models or scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from loragen_agents.conversation.react import (
    ACTION,
    ACTION_INPUT,
    OBSERVATION_STOP,
    THOUGHT_QUESTION,
    USE_TOOL,
    answer_text,
    tool_step_text,
)
from loragen_agents.conversation.turns import TakenStep, Turn
from loragen_agents.errors import DataError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.content import content_folder
from loragen_agents.support.files import replacing

_HISTORY = "Previous conversation:"
_REQUEST = "New input:"
_CLOSING = "Let's think step by step."

_TOOL = re.compile(r"^> *(?P<name>[^:\n]+): *(?P<description>.+)$", re.MULTILINE)
_COUNT = re.compile(r"comma[- ]separated string of (two|three|four)", re.IGNORECASE)
_COUNTS = {"two": 2, "three": 3, "four": 4}
_SPEAKER = re.compile(r"^(Human|AI): ?", re.MULTILINE)
_STEP = re.compile(
    rf"{re.escape(THOUGHT_QUESTION + USE_TOOL)}\s*"
    rf"{ACTION} (?P<action>[^\n]*)"
    rf"{ACTION_INPUT} (?P<input>[^\n]*)"
    rf"(?:{OBSERVATION_STOP}(?P<observation>(?:(?!{re.escape(THOUGHT_QUESTION)})[\s\S])*))?"
)


@dataclass(frozen=True)
class GPT4ToolsSample:
    """One row of a GPT4Tools file.

    Attributes:
        id: the row's id, or its number in the file.
        registry: the tools that its prompt lists, with csv inputs.
        turns: the user turn; the last turn is open and holds the steps that were taken.
        output: the gold continuation, from `Thought:` on.
        due: the tool steps that `output` takes, with the observations that it shows; empty where an answer is due.
    """

    id: str
    registry: ToolRegistry
    turns: tuple[Turn, ...]
    output: str
    due: tuple[TakenStep, ...]


def read_gpt4tools(path: Path | str) -> list[GPT4ToolsSample]:
    """Read a GPT4Tools file; rows with equal tools share one registry.

    Raises:
        DataError: the file is missing, cut off or not in this format; the message names the row (the first is 1).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}.") from error
    samples = []
    registries: dict[str, ToolRegistry] = {}
    for number, row in _rows(text, path):
        try:
            samples.append(_sample(row, number, registries))
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}.") from error
    ids = [sample.id for sample in samples]
    if len(set(ids)) < len(ids):
        double = next(sample_id for place, sample_id in enumerate(ids) if sample_id in ids[:place])
        raise DataError(f"{path}: the id {double!r} stands in the file twice.")
    return samples


def write_gpt4tools(samples: Iterable[GPT4ToolsSample], path: Path) -> None:
    """Write samples as a GPT4Tools file that `read_gpt4tools` reads back."""
    rows = [
        {
            "instruction": _instruction(sample.registry, sample.turns),
            "input": "",
            "output": sample.output,
            "id": sample.id,
        }
        for sample in samples
    ]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def taken_steps(text: str) -> tuple[TakenStep, ...]:
    """The tool steps that stand in a stretch of prompt or output, in order."""
    return tuple(
        TakenStep(match["action"].strip(), match["input"].strip(), (match["observation"] or "").strip())
        for match in _STEP.finditer(text)
    )


def _rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The list's rows with their numbers; one by one, so that a cut-off file is known by its last row."""
    decoder = json.JSONDecoder()
    place = _skip(text, 0)
    if text[place : place + 1] != "[":
        raise DataError(f"{path} is no GPT4Tools file: expected a JSON list of rows.")
    place, number = _skip(text, place + 1), 1
    while text[place : place + 1] != "]":
        try:
            row, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, row {number}: damaged or cut off ({error.msg}, line {error.lineno}); fetch the file again."
            ) from error
        yield number, row
        place, number = _skip(text, place), number + 1
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise DataError(f"{path}, row {number}: the list ends without ']': the file is cut off; fetch it again.")


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _sample(row: Any, number: int, registries: dict[str, ToolRegistry]) -> GPT4ToolsSample:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty")
    definitions, turns = split_instruction(row["instruction"])
    if definitions not in registries:
        registries[definitions] = _registry(definitions)
    output = row["output"]
    due = taken_steps(output)
    if not due and f"{THOUGHT_QUESTION} No" not in output:
        raise ValueError(f"'output' holds neither a tool step nor '{THOUGHT_QUESTION} No'")
    return GPT4ToolsSample(str(row.get("id", number)), registries[definitions], turns, output, due)


def split_instruction(instruction: str) -> tuple[str, tuple[Turn, ...]]:
    """Split a prompt into the part that is compressed (definitions and format) and the user turn.

    Raises:
        ValueError: a heading is missing, or the conversation is not in turns.
    """
    definitions, found, rest = instruction.partition(_HISTORY)
    if not found:
        raise ValueError(f"'instruction' has no {_HISTORY!r}")
    history, found, rest = rest.partition(_REQUEST)
    if not found:
        raise ValueError(f"'instruction' has no {_REQUEST!r}")
    head, found, steps = rest.rpartition(_CLOSING)
    if not found:
        raise ValueError(f"'instruction' has no {_CLOSING!r} after the request")
    # The closing paragraph is one line; the request may have several.
    request = head.rpartition("\n")[0].strip()
    if not request:
        raise ValueError(f"'instruction' has no request between {_REQUEST!r} and the closing paragraph")
    return definitions.strip(), (*_history(history), Turn(request, taken_steps(steps)))


def _history(text: str) -> Iterator[Turn]:
    before, *pieces = _SPEAKER.split(text)
    speakers, said = pieces[::2], [piece.strip() for piece in pieces[1::2]]
    if before.strip() or speakers != ["Human", "AI"] * (len(speakers) // 2):
        raise ValueError("the previous conversation must be turns of 'Human:' and 'AI:' lines")
    for request, answer in zip(said[::2], said[1::2], strict=True):
        yield Turn(request, (), answer)


def _registry(definitions: str) -> ToolRegistry:
    tools = [
        Tool(
            name=match["name"].strip(),
            description=match["description"].strip(),
            parameters=_parameters(match["name"].strip(), match["description"]),
        )
        for match in _TOOL.finditer(definitions)
    ]
    if not tools:
        raise ValueError("'instruction' lists no tools (lines of the form '> NAME: DESCRIPTION')")
    return ToolRegistry(tools, input_format="csv")


def _parameters(name: str, description: str) -> dict[str, Any]:
    """Arguments by name where the tool is one that the project's own registries hold, else by number."""
    known = _known_parameters()
    if name in known:
        return known[name]
    match = _COUNT.search(description)
    count = _COUNTS[match[1].lower()] if match else 1
    names = ["input"] if count == 1 else [f"input_{place}" for place in range(1, count + 1)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


@lru_cache
def _known_parameters() -> dict[str, dict[str, Any]]:
    registries = (ToolRegistry.from_yaml(content_folder("tools") / f"gpt4tools_{p}.yaml") for p in ("seen", "unseen"))
    return {tool.name: tool.parameters for registry in registries for tool in registry}


def _instruction(registry: ToolRegistry, turns: Sequence[Turn]) -> str:
    names = ", ".join(registry.names)
    step = tool_step_text(f"the action to take, should be one of [{names}]", "the input to the action")
    lines = [
        "GPT4Tools helps with pictures and answers questions. It sees pictures through its tools alone.",
        "TOOLS:",
        "------",
        "",
        "GPT4Tools has access to the following tools:",
        "",
        *(f"> {tool.name}: {' '.join(tool.description.split())}" for tool in registry),
        "",
        "To use a tool, please use the following format:",
        "",
        "```",
        f"{THOUGHT_QUESTION}{step} the result of the action",
        "```",
        "",
        "An answer without a tool has this format:",
        "",
        "```",
        f"{THOUGHT_QUESTION}{answer_text('[your response here]')}",
        "```",
        "",
        "File names are taken from the conversation and never made up.",
        "",
        _HISTORY,
        "",
    ]
    for turn in turns[:-1]:
        lines += [f"Human: {turn.request}", f"AI: {turn.answer}"]
    lines += [
        "",
        f"{_REQUEST} {turns[-1].request}",
        f"What the tools report is shown to GPT4Tools alone. {_CLOSING}",
        "",
    ]
    steps = [
        f"{THOUGHT_QUESTION}{tool_step_text(step.action, step.action_input)} {step.observation}\n"
        for step in turns[-1].steps
    ]
    return "\n".join(lines) + "".join(steps)
