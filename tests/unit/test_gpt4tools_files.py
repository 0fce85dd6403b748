"""GPT4Tools' file format: read by its rules, written and read back, damage named by row."""

import json
from pathlib import Path
from typing import Any

import pytest

from loragen_agents.bench.gpt4tools_task import file_task
from loragen_agents.conversation.prompts import TakenStep, Turn
from loragen_agents.data.gpt4tools_files import GPT4ToolsSample, read_gpt4tools, taken_steps
from loragen_agents.data.gpt4tools_mini import MINI_PARTS, MiniPart, mini_samples
from loragen_agents.data.gpt4tools_mini_rows import mini_registry, mini_turns, write_mini
from loragen_agents.errors import DataError

# The layout of GPT4Tools' prompts, with text of our own.
PROMPT = """The assistant deals with words and pictures.
TOOLS:
------

GPT4Tools has access to the following tools:

> Detect Face: finds faces. The input to this tool should be a string, representing the image_path
> Swap Sky: puts in a new sky: any kind. The input to this tool should be a comma separated string of three, \
representing the image_path, the old sky, the new sky

To use a tool, please use the following format:

```
Thought: Do I need to use a tool? Yes
Action: the action to take, should be one of [Detect Face, Swap Sky]
Action Input: the input to the action
Observation: the result of the action
```

Otherwise:

```
Thought: Do I need to use a tool? No
AI: [your response here]
```

Rules on file names.

Previous conversation:

HISTORY

New input: REQUEST
Only the assistant sees what tools report. Let's think step by step.
STEPS"""
HISTORY = (
    "Human: Provide an image named image/abcdefgh.png. Description: A pier.\nTwo boats. Understand it.\nAI: Received."
)
STEPS = (
    "Thought: Do I need to use a tool? Yes\nAction: Detect Face\nAction Input: image/abcdefgh.png\n"
    "Observation: image/zyxwvuts.png\n"
)
OUTPUT = "Thought: Do I need to use a tool? Yes\nAction: Swap Sky\nAction Input: a.png, grey, blue\nObservation:\n"


def row(history: str = HISTORY, request: str = "Blue sky, please.", steps: str = "", **fields: Any) -> dict[str, Any]:
    instruction = PROMPT.replace("HISTORY", history).replace("REQUEST", request).replace("STEPS", steps)
    return {"instruction": instruction, "input": "", "output": OUTPUT, "id": 7, **fields}


def read(tmp_path: Path, *rows: Any) -> list[GPT4ToolsSample]:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read_gpt4tools(path)


def test_prompt_is_split_into_definitions_and_user_turn(tmp_path: Path) -> None:
    one, two = read(tmp_path, row(), row(steps=STEPS, history="", request="Faces,\nthen\na new sky", id=8))
    assert one.id == "7" and one.registry is two.registry
    assert one.registry.names == ("Detect Face", "Swap Sky") and one.registry.input_format == "csv"
    assert one.registry["Swap Sky"].description.startswith("puts in a new sky: any kind.")
    assert len(one.registry["Swap Sky"].argument_names) == 3
    assert one.registry["Detect Face"].argument_names == ("image_path",)  # as in the project's own registry
    opening = "Provide an image named image/abcdefgh.png. Description: A pier.\nTwo boats. Understand it."
    assert one.turns == (Turn(opening, (), "Received."), Turn("Blue sky, please."))
    assert one.due == (TakenStep("Swap Sky", "a.png, grey, blue", ""),)
    step = TakenStep("Detect Face", "image/abcdefgh.png", "image/zyxwvuts.png")
    assert two.turns == (Turn("Faces,\nthen\na new sky", (step,)),)


def test_output_of_several_steps() -> None:
    text = STEPS.replace("Observation: ", "Observation:\n") + OUTPUT + "Thought: Do I need to use a tool? No\nAI: ok\n"
    assert [step.observation for step in taken_steps(text)] == ["image/zyxwvuts.png", ""]


@pytest.mark.parametrize("part", MINI_PARTS)
def test_mini_is_in_this_format(part: MiniPart, tmp_path: Path) -> None:
    path, count = write_mini(part, tmp_path)
    found = read_gpt4tools(path)
    wanted = [
        (sample.id, mini_turns(sample), sample.output, taken_steps(sample.output)) for sample in mini_samples(part)
    ]
    registry = mini_registry(part)
    assert count == len(found)
    assert [(s.id, s.turns, s.output, s.due) for s in found] == wanted
    assert found[0].registry.names == registry.names
    assert [tool.parameters for tool in found[0].registry] == [tool.parameters for tool in registry]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"instruction": "Hello"}, "row 2: 'instruction' has no 'Previous conversation:'"),
        (row(output=""), "row 2: 'output' must be a text"),
        (row(output="Hello."), "row 2: 'output' holds neither"),
        ([1], "row 2: expected an object"),
        (row(request=""), "row 2: 'instruction' has no request"),
        (row(history="AI: Hello."), "row 2: the previous conversation"),
        (row(id=7), "the id '7' stands in the file twice"),
        (row(id=8, instruction=row()["instruction"].replace("> ", "- ")), "row 2: 'instruction' lists no tools"),
        (row(id=8, instruction=row()["instruction"].replace("Let's", "Lets")), "row 2: 'instruction' has no \"Let's"),
    ],
)
def test_damaged_rows_are_named(damaged: Any, message: str, tmp_path: Path) -> None:
    if isinstance(damaged, dict) and "output" not in damaged:
        damaged = {**damaged, "output": OUTPUT}
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        read(tmp_path, row(), damaged)


def test_half_downloaded_files_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    whole = json.dumps([row(id=1), row(id=2), row(id=3)])
    path.write_text(whole[: int(len(whole) * 0.8)], encoding="utf-8")
    with pytest.raises(DataError, match=r"half\.json, row 3: damaged or cut off"):
        read_gpt4tools(path)
    path.write_text(whole[:-1], encoding="utf-8")
    with pytest.raises(DataError, match="cut off"):
        read_gpt4tools(path)
    path.write_text("<html>", encoding="utf-8")
    with pytest.raises(DataError, match="expected a JSON list"):
        read_gpt4tools(path)
    with pytest.raises(DataError, match="can't be read"):
        read_gpt4tools(tmp_path / "missing.json")


def test_file_task_spreads_a_limit_and_groups_registries(tmp_path: Path) -> None:
    other = PROMPT.replace("> Detect Face", "> Detect Horse")
    rows = []
    for number in range(10):
        instruction = (other if number % 2 else PROMPT).replace("HISTORY", "").replace("STEPS", "")
        rows.append(row(id=number, instruction=instruction.replace("REQUEST", f"Request {number}")))
    path = tmp_path / "own.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    task = file_task([path], limit=5)
    assert sorted(sample.turns[-1].request for sample in task.samples) == [f"Request {n}" for n in range(0, 10, 2)]
    grouped = file_task([path])
    names = [sample.registry.names[0] for sample in grouped.samples]
    assert names == ["Detect Face"] * 5 + ["Detect Horse"] * 5
    together = file_task([path], tools="all")
    assert {sample.registry.names for sample in together.samples} == {("Detect Face", "Swap Sky", "Detect Horse")}
    with pytest.raises(DataError, match="same name"):
        file_task([path, path])
