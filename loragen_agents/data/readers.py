"""Reads the original downloads of Seal-Tools, MetaTool and Schema-Guided Dialogue into the intermediate format.

Each reader takes a checkout of the source's repository and gives a `DataSet`. Which tools and rows are kept for
choosing between models (split dev), and which are left out for a final test, stands in `splits.yaml`. The readers know
the files of their source and nothing of prompts or registries.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loragen_agents.data.records import Call, CallRecord, DataSet, Split, ToolRecord, splits
from loragen_agents.errors import DataError
from loragen_agents.support.json_lines import json_lines

MAX_SGD_QUERY = 400
LAST_UTTERANCES = 4
_SEAL_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def _json_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); is --input a checkout of the source?") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON in UTF-8 ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSON lines file, each with its place for messages."""
    for number, row in json_lines(path, "; is --input a checkout of the source?"):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def read_seal_tools(folder: Path) -> DataSet:
    """Read a checkout of fairyshine/Seal-Tools.

    Its files are `tool.jsonl`, `dev.jsonl`, `test_in_domain.jsonl`, `test_out_domain.jsonl` and, where it is there,
    `train.jsonl`. Tools that the out-of-domain test calls are left out, with all rows that call them.

    Raises:
        DataError: a file is missing or damaged; file and row number are named.
    """
    folder = folder / "Seal-Tools_Dataset" if (folder / "Seal-Tools_Dataset").is_dir() else folder
    left_out = {
        call["api"] for _, row in _json_lines(folder / "test_out_domain.jsonl") for call in row.get("calling", ())
    }
    tools: dict[str, ToolRecord] = {}
    for where, row in _json_lines(folder / "tool.jsonl"):
        try:
            if row["api_name"] in left_out:
                continue
            properties = {
                name: {"type": _SEAL_TYPES[schema["type"]], "description": schema["description"]}
                for name, schema in row["parameters"].items()
            }
            tool = ToolRecord(
                id=f"seal/{row['api_name']}",
                name=row["api_name"],
                description=row["api_description"],
                domain=row["field"],
                source="seal-tools",
                split="train",
                parameters={
                    "type": "object",
                    "properties": properties,
                    "required": [name for name in properties if name in row["required"]],
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not a tool of Seal-Tools ({error!r})") from error
        tools[tool.id] = tool
    dev_rows = set(splits()["seal-tools"]["dev_rows"])
    calls = []
    names = [name for name in ("train.jsonl", "dev.jsonl", "test_in_domain.jsonl") if (folder / name).is_file()]
    for name in names:
        for where, row in _json_lines(folder / name):
            try:
                steps = tuple(Call(f"seal/{call['api']}", call["parameters"]) for call in row["calling"])
                split: Split = "dev" if row["id"] in dev_rows else "train"
                record = CallRecord(row["query"], steps, "seal-tools", split)
            except (KeyError, TypeError) as error:
                raise DataError(f"{where}: not a row of Seal-Tools ({error!r})") from error
            if all(step.tool in tools for step in steps):
                calls.append(record)
    return DataSet(tools, tuple(calls))


def read_metatool(folder: Path) -> DataSet:
    """Read a checkout of HowieHwong/MetaTool: `dataset/plugin_des.json` and `dataset/data/all_clean_data.csv`.

    MetaTool is about the choice of a tool; the one argument of every tool is the request itself.

    Raises:
        DataError: a file is missing or damaged; file and row number are named.
    """
    split = splits()["metatool"]
    descriptions = _json_file(folder / "dataset" / "plugin_des.json")
    if not isinstance(descriptions, dict):
        raise DataError(f"{folder / 'dataset' / 'plugin_des.json'}: expected an object of tool names and descriptions")
    parameters = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "what the user asks for"}},
        "required": ["query"],
    }
    tools = {
        f"metatool/{name}": ToolRecord(
            id=f"metatool/{name}",
            name=name,
            description=description,
            domain="plugin",
            source="metatool",
            split="dev" if name in split["dev_tools"] else "train",
            parameters=parameters,
        )
        for name, description in descriptions.items()
        if name not in split["left_out"]
    }
    path = folder / "dataset" / "data" / "all_clean_data.csv"
    calls = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                query, name = row.get("Query"), row.get("Tool")
                if not query or not name:
                    raise DataError(f"{path}, row {number}: expected the columns Query and Tool, got {row}")
                tool = tools.get(f"metatool/{name}")
                if tool is not None:
                    calls.append(CallRecord(query, (Call(tool.id, {"query": query}),), "metatool", tool.split))
                elif name not in split["left_out"]:
                    raise DataError(f"{path}, row {number}: the tool {name!r} has no description in plugin_des.json")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}); is --input a checkout of the source?") from error
    return DataSet(tools, tuple(calls))


def read_sgd(folder: Path) -> DataSet:
    """Read a checkout of google-research-datasets/dstc8-schema-guided-dialogue: the folders `train` and `dev`.

    A request is what the user has said since the last service call, at most `LAST_UTTERANCES` utterances. Arguments are
    kept where those words state their value; a call is kept where two arguments, or all required ones, are stated.
    Services that only `dev` has are of split dev; those that only `test` has are left out.

    Raises:
        DataError: a file is missing or damaged, by name.
    """
    tools: dict[str, ToolRecord] = {}
    split: Split
    for split in ("train", "dev"):
        for service in _json_file(folder / split / "schema.json"):
            for tool in _sgd_tools(service, split):
                tools.setdefault(tool.id, tool)
    calls = []
    for name in ("train", "dev"):
        for path in sorted((folder / name).glob("dialogues_*.json")):
            for dialogue in _json_file(path):
                try:
                    calls += list(_sgd_calls(dialogue, tools))
                except (KeyError, TypeError, AttributeError) as error:
                    raise DataError(f"{path}: not dialogues of SGD ({error!r})") from error
    return DataSet(tools, tuple(calls))


def _sgd_tools(service: dict[str, Any], split: Split) -> Iterator[ToolRecord]:
    slots = {slot["name"]: slot for slot in service["slots"]}
    for intent in service["intents"]:
        properties: dict[str, Any] = {}
        for name in [*intent["required_slots"], *intent["optional_slots"]]:
            properties[name] = {"type": "string", "description": slots[name]["description"]}
            if slots[name]["is_categorical"] and slots[name]["possible_values"]:
                properties[name]["enum"] = slots[name]["possible_values"]
        yield ToolRecord(
            id=f"sgd/{service['service_name']}.{intent['name']}",
            name=intent["name"],
            description=intent["description"],
            domain=service["service_name"],
            source="sgd",
            split=split,
            parameters={"type": "object", "properties": properties, "required": list(intent["required_slots"])},
        )


def _sgd_calls(dialogue: dict[str, Any], tools: dict[str, ToolRecord]) -> Iterator[CallRecord]:
    said: list[str] = []
    for turn in dialogue["turns"]:
        if turn["speaker"] == "USER":
            said.append(turn["utterance"])
            continue
        for frame in turn["frames"]:
            call = frame.get("service_call")
            if call is None:
                continue
            query, said = " ".join(said[-LAST_UTTERANCES:]), []
            tool = tools[f"sgd/{frame['service']}.{call['method']}"]
            stated = {
                name: call["parameters"][name]
                for name in sorted(call["parameters"])
                if call["parameters"][name].lower() in query.lower()
            }
            enough = len(stated) >= 2 or set(tool.required) <= stated.keys()
            if enough and len(query) <= MAX_SGD_QUERY:
                yield CallRecord(query, (Call(tool.id, stated),), "sgd", tool.split)


READERS: dict[str, Callable[[Path], DataSet]] = {
    "seal-tools": read_seal_tools,
    "metatool": read_metatool,
    "sgd": read_sgd,
}
