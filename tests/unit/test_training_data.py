"""The intermediate format: what is read, what is refused and how, and what is mended."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loragen_agents.cli import main
from loragen_agents.data.argument_values import fits_type, states
from loragen_agents.data.records import (
    Call,
    CallRecord,
    DataSet,
    ToolRecord,
    load_data,
    read_call_records,
    read_tool_records,
    repair,
    write_data,
)
from loragen_agents.errors import DataError

TOOL = {
    "id": "shop/buy",
    "name": "buy",
    "description": "Buy a thing.",
    "domain": "shop",
    "source": "shop",
    "split": "train",
    "parameters": {
        "type": "object",
        "properties": {"thing": {"type": "string"}, "count": {"type": "integer"}},
        "required": ["thing", "count"],
    },
}
CALL = {
    "query": "Buy two lamps",
    "calls": [{"tool": "shop/buy", "arguments": {"thing": "lamps", "count": 2}}],
    "source": "shop",
    "split": "train",
}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def data_set(*calls: CallRecord, **tool_fields) -> DataSet:
    tool = ToolRecord(**{**TOOL, **tool_fields})
    return DataSet({tool.id: tool}, calls)


def call(query: str, source: str = "shop", split: str = "train", **arguments) -> CallRecord:
    return CallRecord(query, (Call("shop/buy", arguments),), source, split)  # type: ignore[arg-type]


def test_what_is_written_is_read_back(tmp_path):
    data = data_set(call("Kaufe Öl", split="dev", thing="Öl", count=1), call("Buy lamps", thing="lamps", count=2))
    write_data(data, tmp_path / "new")
    assert load_data(tmp_path / "new") == data
    assert "Öl" in (tmp_path / "new" / "calls_dev.jsonl").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "calls_dev.jsonl",
        "calls_train.jsonl",
        "tools.jsonl",
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"id": "x", ', "not a JSON object on one line"),
        ([1, 2], "expected a JSON object, got list"),
        ({**TOOL, "name": ""}, "'name' must be a non-empty string"),
        ({**TOOL, "split": "test"}, "'split' must be one of train, dev, got 'test'"),
        ({**TOOL, "parameters": []}, "'parameters' must be a JSON Schema object"),
        ({**TOOL, "parameters": {"properties": {"a": 1}}}, "the schema of argument 'a' must be a JSON object"),
        ({**TOOL, "parameters": {"properties": {}, "required": ["a"]}}, "'required' must list arguments"),
        (TOOL, "the tool id 'shop/buy' stands in the file twice"),
    ],
)
def test_a_damaged_tool_is_named_by_file_and_row(tmp_path, row, complaint):
    path = write_lines(tmp_path / "tools.jsonl", TOOL, "", row)
    with pytest.raises(DataError) as error:
        read_tool_records(path)
    assert f"{path}, row 3: " in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("]", "not a JSON object on one line"),
        ({**CALL, "query": None}, "'query' must be a non-empty string, got None"),
        ({**CALL, "calls": {}}, "'calls' must be a list"),
        ({**CALL, "calls": [{"tool": "shop/buy"}]}, "call 1 must be an object with 'tool' and 'arguments'"),
        ({**CALL, "calls": [{"tool": "shop/sell", "arguments": {}}]}, "the tool 'shop/sell' is not in tools.jsonl"),
        (
            {**CALL, "calls": [{"tool": "shop/buy", "arguments": {"size": 1}}]},
            "the tool 'shop/buy' has no argument size",
        ),
    ],
)
def test_a_damaged_request_is_named_by_file_and_row(tmp_path, row, complaint):
    tools = read_tool_records(write_lines(tmp_path / "tools.jsonl", TOOL))
    path = write_lines(tmp_path / "calls_train.jsonl", CALL, row)
    with pytest.raises(DataError) as error:
        read_call_records(path, tools)
    assert f"{path}, row 2: " in str(error.value)
    assert complaint in str(error.value)


def test_missing_files_and_other_encodings_are_named(tmp_path):
    with pytest.raises(DataError, match=r"tools\.jsonl: can't be read"):
        load_data(tmp_path)
    path = write_lines(tmp_path / "tools.jsonl", TOOL)
    with pytest.raises(DataError, match=r"no calls_\*\.jsonl beside tools\.jsonl"):
        load_data(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_tool_records(path)


def test_two_data_sets_join_unless_they_define_a_tool_differently():
    one, other = data_set(call("Buy", thing="a", count=1)), data_set(call("Get", thing="b", count=2))
    assert len((one + other).calls) == 2
    with pytest.raises(DataError, match="'shop/buy' is defined twice, differently"):
        one + data_set(name="purchase")


def test_a_tool_that_a_dev_request_calls_is_held_out():
    assert data_set(call("Buy", thing="a", count=1)).held_out_tools() == frozenset()
    assert data_set(call("Buy", split="dev", thing="a", count=1)).held_out_tools() == {"shop/buy"}
    assert data_set(split="dev").held_out_tools() == {"shop/buy"}


def test_values_are_converted_where_nothing_is_lost():
    mended = repair(data_set(call("Buy 2 of 7", thing=7, count="2")))
    assert mended.calls[0].calls[0].arguments == {"thing": "7", "count": 2}
    assert mended.tools["shop/buy"].properties["count"] == {"type": "integer"}


def test_an_argument_with_values_of_another_type_becomes_a_string_for_all():
    mended = repair(data_set(call("Buy a few lamps", thing="lamps", count="a few"), call("2", thing="2", count=2)))
    assert mended.tools["shop/buy"].properties["count"] == {"type": "string"}
    assert [record.calls[0].arguments["count"] for record in mended.calls] == ["a few", "2"]


def test_a_required_argument_that_a_call_leaves_out_becomes_optional():
    mended = repair(data_set(call("Buy lamps", thing="lamps"), call("Buy 2 lamps", thing="lamps", count=2)))
    assert mended.tools["shop/buy"].required == ("thing",)


def test_arguments_come_in_the_order_of_the_schema():
    assert list(repair(data_set(call("", count=1, thing="a"))).calls[0].calls[0].arguments) == ["thing", "count"]


def test_training_rows_lose_what_their_request_does_not_state():
    unstated = call("Buy lamps", "seal-tools", thing="lamps", count=31)
    reference = call("Buy what you found", "seal-tools", thing="API_call_0", count=1)
    mended = repair(data_set(unstated, reference, replace(unstated, split="dev")))
    assert [record.calls[0].arguments for record in mended.calls] == [
        {"thing": "lamps"},
        {"thing": "lamps", "count": 31},
    ]


@pytest.mark.parametrize(
    ("query", "value", "stated"),
    [
        ("a loan of $200,000", 200000, True),
        ("at 30 degrees", 30.0, True),
        ("three of them", 3, True),
        ("the lift coefficient", 36.9, False),
        ("from April 15, 2019", "2019-04-15", True),
        ("in New York", "new york city", True),
        ("play music", "192.168.100.164", False),
        ("the answer is X", "x", True),
        ("anything", True, True),
    ],
)
def test_states(query, value, stated):
    assert states(query, value) is stated


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        (True, {"type": "integer"}, False),
        (True, {"type": "boolean"}, True),
        (1, {"type": "number"}, True),
        (1.5, {"type": "integer"}, False),
        ("a", {"enum": ["a", "b"]}, True),
        ("c", {"type": "string", "enum": ["a", "b"]}, False),
        ([1], {"type": "array"}, True),
        ("x", {"type": ["string", "null"]}, True),
    ],
)
def test_fits_type(value, schema, fits):
    assert fits_type(value, schema) is fits


def test_the_command_line_counts_and_shows(tmp_path, capsys):
    write_lines(tmp_path / "tools.jsonl", TOOL)
    calls = [{**CALL, "query": f"Buy two lamps, please, order {number}"} for number in range(12)]
    write_lines(tmp_path / "calls_train.jsonl", *calls)
    assert main(["data", "check", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"source": "shop", "split": "train", "tools": 1, "requests": 12},
    ]
    assert main(["data", "sample", str(tmp_path), "--count", "2"]) == 0
    assert "Registry of 1 tools" in capsys.readouterr().out
    assert main(["data", "build", "--source", "sgd", "--out", str(tmp_path / "x")]) == 1
    assert "needs --input" in capsys.readouterr().err


def everyday_folder(folder: Path) -> Path:
    for source in ("hwu64", "slurp", "home-llm"):
        tools = [{**TOOL, "id": f"{source}/{name}", "name": name, "source": source} for name in ("buy", "sell")]
        write_lines(folder / f"tools_{source}.jsonl", *tools)
        calls = [{"tool": f"{source}/{name}", "arguments": {"thing": "lamps"}} for name in ("buy", "sell")]
        rows = [{**CALL, "source": source, "calls": calls[:1]}, {**CALL, "source": source, "calls": calls}]
        write_lines(folder / f"calls_{source}.jsonl", *rows)
    (folder / "near_duplicates.json").write_text(json.dumps({"buy": ["hwu64/buy", "home-llm/buy"]}))
    return folder


def test_a_folder_may_have_a_file_of_tools_for_each_source_and_name_tools_that_are_alike(tmp_path):
    data = load_data(everyday_folder(tmp_path))
    assert len(data.tools) == 6
    assert data.alike == (frozenset({"hwu64/buy", "home-llm/buy"}),)
    assert repair(data).alike == data.alike


def test_held_out_sources_are_of_split_dev_whatever_their_rows_say(tmp_path):
    data = load_data(everyday_folder(tmp_path))
    assert {tool.source for tool in data.tools.values() if tool.split == "dev"} == {"slurp"}
    assert {record.source for record in data.calls if record.split == "dev"} == {"slurp"}
    assert data.held_out_tools() == {"slurp/buy", "slurp/sell"}


def test_requests_with_several_calls_of_a_source_that_tests_them_are_left_out(tmp_path):
    data = load_data(everyday_folder(tmp_path))
    several = {record.source for record in data.calls if len(record.calls) > 1}
    assert several == {"hwu64", "slurp"}


def test_a_damaged_list_of_tools_that_are_alike_is_named(tmp_path):
    (everyday_folder(tmp_path) / "near_duplicates.json").write_text("[1]")
    with pytest.raises(DataError, match=r"near_duplicates\.json"):
        load_data(tmp_path)
