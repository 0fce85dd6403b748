"""The project's own tools: the notation, what it refuses, and what is built from it."""

import json
from pathlib import Path

import pytest

from loragen_agents.cli import main
from loragen_agents.data.argument_values import fits_type, states
from loragen_agents.data.records import (
    Call,
    CallRecord,
    DataSet,
    ToolRecord,
    check_calls,
    load_data,
    write_data,
)
from loragen_agents.data.templates import MIN_TEMPLATES, build_computer_tools, read_computer_tools
from loragen_agents.errors import DataError

LINES = [f"    ask for it in way number {number} with {{name}}" for number in range(MIN_TEMPLATES)]


def write_folder(folder: Path, domain: str) -> Path:
    (folder / "values.yaml").write_text("who: Ann | Bob\nage: {from: 1, to: 9, step: 2}\npair: ['{who} and {who}']\n")
    (folder / "frames.yaml").write_text('"<Vp>.": 1\n')
    (folder / "patterns.yaml").write_text("greet: |\n  greet the <thing> {name}\n  Hello <thing> {name}!\n")
    (folder / "house.yaml").write_text(domain)
    return folder


def domain(*lines: str, args: str = "{name: who - a person}", use: str = "") -> str:
    return f"visit:\n  about: Visit a person.\n  args: {args}\n{use}  ask: |\n" + "\n".join([*LINES, *lines]) + "\n"


def test_slots_choices_frames_and_fixed_arguments(tmp_path):
    text = domain(
        "    (call|phone) {name} at age {age}",
        "    ~quick call to {name}",
        "    Is {name} very old? || age=9",
        args="{name: who - a person, age: age - years, mood: happy|sad - how}",
    )
    text += "    Cheer {name} up || mood=sad\n    Be {mood} with {name}\n"
    data = build_computer_tools(copies=6, folder=write_folder(tmp_path, text))
    (tool,) = data.tools.values()
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "a person"},
            "age": {"type": "integer", "description": "years"},
            "mood": {"type": "string", "enum": ["happy", "sad"], "description": "how"},
        },
        "required": ["name"],
    }
    rows = {record.query: record.calls[0].arguments for record in data.calls}
    assert rows["Ask for it in way number 0 with Ann."] == {"name": "Ann"}
    assert rows["quick call to Bob"] == {"name": "Bob"}
    assert rows["Is Ann very old?"] == {"name": "Ann", "age": 9}
    assert rows["Cheer Bob up"] == {"name": "Bob", "mood": "sad"}
    called = [query for query in rows if " at age " in query]
    assert {query.split()[0] for query in called} == {"Call", "Phone"}
    assert all(rows[query]["age"] == int(query.rstrip(".").split()[-1]) for query in called)
    assert len(rows) == len(data.calls)


def test_shared_patterns_and_nested_values(tmp_path):
    text = domain(args="{name: pair - two people}", use="  use: greet(thing=guests)\n")
    data = build_computer_tools(copies=8, folder=write_folder(tmp_path, text))
    queries = {record.query for record in data.calls}
    assert {"Hello guests Ann and Bob!", "Greet the guests Bob and Ann."} <= queries


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (domain(args="{name: nobody - a person}"), "takes its values from 'nobody', which is not in values.yaml"),
        (domain(args="{name: who}"), "argument 'name' must read 'VALUES - what it is'"),
        (domain("    go to {place}"), "states place, which is no argument"),
        (domain("    go || name"), "expected 'argument=value' behind '||'"),
        (domain("    (go|run {name}"), "has a '|' outside of a choice"),
        (domain(args="{name: who - a person, age: age - years}"), "no template states age"),
        (domain("    go || a=z", args="{name: who - x, a: b|c - y}"), "sets a to 'z'"),
        (domain(use="  use: shout(thing=x)\n"), "'use' must read pattern(word=..., ...)"),
        (domain(use="  use: greet()\n"), "the pattern 'greet' needs thing=..."),
        (domain().replace("number 7", "number 8"), "19 different templates; expected at least 20"),
        (domain().replace("  about:", "  abuot:"), "expected 'about' and 'ask'"),
        ("- a list", "expected a mapping of tool names to tools"),
        ("visit: [", "can't be read as YAML"),
    ],
)
def test_a_mistake_is_named_with_its_tool(tmp_path, text, complaint):
    with pytest.raises(DataError) as error:
        build_computer_tools(folder=write_folder(tmp_path, text))
    assert complaint in str(error.value)
    assert "house.yaml" in str(error.value)


def test_there_are_300_tools_with_20_phrasings_each_and_a_tenth_is_held_out():
    tools = read_computer_tools()
    assert len(tools) >= 300
    assert all(len({template.text for template in tool.templates}) >= MIN_TEMPLATES for tool in tools)
    assert len({tool.name for tool in tools}) == len(tools)
    held_out = sum(tool.split == "dev" for tool in tools)
    assert 0.06 < held_out / len(tools) < 0.15


def test_the_built_data_is_sound_and_the_command_writes_it(tmp_path, capsys):
    assert main(["data", "build", "--source", "computer", "--copies", "1", "--out", str(tmp_path), "--json"]) == 0
    counts = {row["split"]: row for row in json.loads(capsys.readouterr().out)}
    assert counts["train"]["tools"] >= 270
    data = load_data(tmp_path)
    built = build_computer_tools(copies=1)
    assert data.tools == built.tools
    assert list(data.calls) == sorted(built.calls, key=lambda record: record.split)
    texts: dict[str, str] = {}
    for record in data.calls:
        check_calls(record, data.tools)
        (call,) = record.calls
        tool = data.tools[call.tool]
        assert set(tool.required) <= call.arguments.keys()
        for name, value in call.arguments.items():
            assert fits_type(value, tool.properties[name]), (record.query, name, value)
        assert not _marks_left(record.query, call.arguments), record.query
        # The same words must not ask for two tools.
        assert texts.setdefault(record.query.lower().strip(" .?!"), call.tool) == call.tool, record.query


def _marks_left(query: str, arguments: dict) -> set[str]:
    """The notation's own marks in a request, values aside (JSON texts and patterns have some)."""
    for value in sorted(map(str, arguments.values()), key=len, reverse=True):
        query = query.replace(value, "")
    return set("{}|<") & set(query)


def test_descriptions_become_requests_that_state_every_argument(tmp_path):
    properties = {
        "bridge_id": {"type": "string", "description": "The ID of the bridge"},
        "unit": {"type": "string", "description": "The unit (e.g., metres, feet)"},
        "year": {"type": "integer", "description": "The year"},
        "load": {"type": "number", "description": "The load in tonnes (e.g., 1.5)"},
    }
    parameters = {"type": "object", "properties": properties, "required": ["bridge_id", "unit"]}

    def tool(name: str, split: str = "train", description: str = "Retrieve the length of a bridge") -> ToolRecord:
        return ToolRecord(name, name, description, "Bridges", "seal-tools", split, parameters)  # type: ignore[arg-type]

    tools = [tool("free"), tool("called"), tool("held", "dev"), tool("noun", description="bridges")]
    call = CallRecord("How long?", (Call("called", {"bridge_id": "x", "unit": "feet"}),), "seal-tools", "train")
    write_data(DataSet({tool.id: tool for tool in tools}, (call,)), tmp_path / "in")
    arguments = ["data", "build", "--source", "described", "--copies", "30", "--input", str(tmp_path / "in")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    made = load_data(tmp_path / "out")
    assert list(made.tools) == ["free"]
    assert len(made.calls) > 20
    for record in made.calls:
        (gold,) = record.calls
        assert {"bridge_id", "unit"} <= gold.arguments.keys()
        assert gold.arguments["unit"] in ("metres", "feet")
        assert all(fits_type(value, properties[name]) for name, value in gold.arguments.items())
        assert all(states(record.query, value) for value in gold.arguments.values()), record
        assert "the length of a bridge" in record.query
        assert not set("<>{}") & set(record.query)


def test_values_may_be_said_in_other_words_than_they_are_given(tmp_path):
    args = "{name: who - a person, count: dozens - n, sure: certain - ok}"
    folder = write_folder(tmp_path, domain("    {name}, {count} of them, {sure}", args=args))
    with (folder / "values.yaml").open("a") as file:
        file.write('dozens: [a dozen => 12, "7 => 7"]\ncertain: [sure => true]\n')
    data = build_computer_tools(copies=40, folder=folder)
    (tool,) = data.tools.values()
    assert [schema["type"] for schema in tool.properties.values()] == ["string", "integer", "boolean"]
    rows = {record.query: record.calls[0].arguments for record in data.calls}
    assert rows["Ann, a dozen of them, sure"] == {"name": "Ann", "count": 12, "sure": True}
    assert rows["Bob, 7 of them, sure"] == {"name": "Bob", "count": 7, "sure": True}


def test_converted_values_must_be_of_one_type(tmp_path):
    folder = write_folder(tmp_path, domain())
    with (folder / "values.yaml").open("a") as file:
        file.write("mixed: [a dozen => 12, some => many]\n")
    with pytest.raises(DataError, match="mixed"):
        build_computer_tools(folder=folder)
