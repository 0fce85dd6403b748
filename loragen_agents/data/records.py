"""The intermediate format of the training data: tools and the requests that call them, one JSON object a line.

A data folder holds `tools.jsonl`, or a `tools_SOURCE.jsonl` for each source (`id`, `name`, `description`, `domain`,
`source`, `split`, `parameters`), and any number of `calls_*.jsonl` (`query`, `calls`: a list of `tool` id and
`arguments` in order, `source`, `split`). This module reads, writes and repairs those records. It knows what
a tool is; nothing of registries, prompts or models.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from loragen_agents.data.argument_values import coerced, fits_type, states
from loragen_agents.errors import DataError
from loragen_agents.registry import Tool
from loragen_agents.support.files import replacing
from loragen_agents.support.json_lines import json_lines

Split = Literal["train", "dev"]
SPLITS = ("train", "dev")


@dataclass(frozen=True)
class ToolRecord:
    """One tool of a source; `parameters` is a JSON Schema object, `id` is unique over all sources."""

    id: str
    name: str
    description: str
    domain: str
    source: str
    split: Split
    parameters: dict[str, Any]

    @property
    def properties(self) -> dict[str, dict[str, Any]]:
        """Schema of each argument, in order."""
        return self.parameters.get("properties", {})

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the arguments that every call gives."""
        return tuple(self.parameters.get("required", ()))

    def as_tool(self) -> Tool:
        """The tool as a registry has it, under its own names.

        Raises:
            RegistryError: it is no usable tool.
        """
        return Tool(name=self.name, description=self.description, parameters=self.parameters)


@dataclass(frozen=True)
class Call:
    """One tool call of a request: the tool's id and its arguments by name."""

    tool: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CallRecord:
    """One request with the calls that serve it, in order; no calls: a request that takes no tool."""

    query: str
    calls: tuple[Call, ...]
    source: str
    split: Split


@dataclass(frozen=True)
class DataSet:
    """Tools by id, and the requests that call them.

    Attributes:
        alike: groups of tools that could serve the same request; a registry holds at most one of each.
    """

    tools: dict[str, ToolRecord] = field(default_factory=dict)
    calls: tuple[CallRecord, ...] = ()
    alike: tuple[frozenset[str], ...] = ()

    def __add__(self, other: "DataSet") -> "DataSet":
        """Join two data sets.

        Raises:
            DataError: both define one tool id, differently.
        """
        for tool_id in self.tools.keys() & other.tools.keys():
            if self.tools[tool_id] != other.tools[tool_id]:
                raise DataError(f"tool {tool_id!r} is defined twice, differently: give one of the two another id")
        return DataSet({**self.tools, **other.tools}, self.calls + other.calls, self.alike + other.alike)

    def held_out_tools(self) -> frozenset[str]:
        """Ids of the tools that no training sample may hold: of split dev, or called by a request of split dev."""
        called = {call.tool for record in self.calls if record.split == "dev" for call in record.calls}
        return frozenset(called | {tool.id for tool in self.tools.values() if tool.split == "dev"})


def _text(row: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{key!r} must be {'a' if empty else 'a non-empty'} string, got {value!r}")
    return value


def _split(row: Mapping[str, Any]) -> Split:
    value = _text(row, "split")
    if value not in SPLITS:
        raise ValueError(f"'split' must be one of {', '.join(SPLITS)}, got {value!r}")
    return value  # type: ignore[return-value]


def tool_from_row(row: Any) -> ToolRecord:
    """Turn one decoded line of `tools.jsonl` into a record.

    Raises:
        ValueError: a field is missing or of the wrong type; the message says which and what was expected.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    parameters = row.get("parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties", {}), dict):
        raise ValueError("'parameters' must be a JSON Schema object with 'properties'")
    properties = parameters.get("properties", {})
    for name, schema in properties.items():
        if not isinstance(schema, dict):
            raise ValueError(f"the schema of argument {name!r} must be a JSON object, got {schema!r}")
    required = parameters.get("required", [])
    if not isinstance(required, list) or not set(required) <= set(properties):
        raise ValueError(f"'required' must list arguments named in 'properties', got {required!r}")
    return ToolRecord(
        id=_text(row, "id"),
        name=_text(row, "name"),
        description=_text(row, "description", empty=True),
        domain=_text(row, "domain", empty=True),
        source=_text(row, "source"),
        split=_split(row),
        parameters=parameters,
    )


def call_from_row(row: Any) -> CallRecord:
    """Turn one decoded line of a `calls_*.jsonl` into a record.

    Raises:
        ValueError: a field is missing or of the wrong type; the message says which and what was expected.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    calls = row.get("calls")
    if not isinstance(calls, list):
        raise ValueError(f"'calls' must be a list, got {calls!r}")
    steps = []
    for number, call in enumerate(calls, 1):
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            raise ValueError(f"call {number} must be an object with 'tool' and 'arguments', got {call!r}")
        steps.append(Call(_text(call, "tool"), call["arguments"]))
    return CallRecord(_text(row, "query"), tuple(steps), _text(row, "source"), _split(row))


def read_tool_records(path: Path | str) -> dict[str, ToolRecord]:
    """Read a `tools.jsonl`; the result is keyed by tool id, in file order.

    Raises:
        DataError: the file is missing, a row is damaged (file and row number are named) or an id stands twice.
    """
    path = Path(path)
    tools: dict[str, ToolRecord] = {}
    for number, row in json_lines(path):
        try:
            tool = tool_from_row(row)
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        if tool.id in tools:
            raise DataError(f"{path}, row {number}: the tool id {tool.id!r} stands in the file twice")
        tools[tool.id] = tool
    return tools


def read_call_records(path: Path | str, tools: Mapping[str, ToolRecord] | None = None) -> list[CallRecord]:
    """Read a `calls_*.jsonl`.

    Args:
        tools: where given, every call must name one of these tools and only arguments that the tool has.

    Raises:
        DataError: the file is missing or a row is damaged; file and row number are named.
    """
    path = Path(path)
    records = []
    for number, row in json_lines(path):
        try:
            record = call_from_row(row)
            if tools is not None:
                check_calls(record, tools)
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        records.append(record)
    return records


def check_calls(record: CallRecord, tools: Mapping[str, ToolRecord]) -> None:
    """Raise ValueError where a call names a tool or an argument that does not exist."""
    for call in record.calls:
        if call.tool not in tools:
            raise ValueError(f"the tool {call.tool!r} is not in tools.jsonl")
        unknown = call.arguments.keys() - tools[call.tool].properties.keys()
        if unknown:
            raise ValueError(f"the tool {call.tool!r} has no argument {', '.join(sorted(unknown))}")


def load_data(*folders: Path | str) -> DataSet:
    """Read the tools and calls of one or several data folders and join them.

    A folder holds `tools.jsonl`, or a `tools_SOURCE.jsonl` for each of its sources, and any number of `calls_*.jsonl`.
    Beside them may stand `near_duplicates.json`, an object of lists of tool ids (see `DataSet.alike`). Sources that
    `splits.yaml` holds out are of split dev, whatever their rows say.

    Raises:
        DataError: a folder lacks these files, a row is damaged, or two folders define one tool id differently.
    """
    data = DataSet()
    for folder in map(Path, folders):
        tools: dict[str, ToolRecord] = {}
        for path in sorted(folder.glob("tools_*.jsonl")) or [folder / "tools.jsonl"]:
            tools |= read_tool_records(path)
        files = sorted(folder.glob("calls_*.jsonl"))
        if not files:
            raise DataError(f"{folder}: no calls_*.jsonl beside tools.jsonl; build it with `loragen-agents data build`")
        calls = [record for file in files for record in read_call_records(file, tools)]
        data = data + DataSet(tools, tuple(calls), _alike(folder / "near_duplicates.json"))
    return _held_out(data)


def _alike(path: Path) -> tuple[frozenset[str], ...]:
    if not path.is_file():
        return ()
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        return tuple(frozenset(map(str, group)) for group in groups.values())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: expected an object of lists of tool ids ({error})") from error


def _held_out(data: DataSet) -> DataSet:
    """The data with everything of the held-out sources in split dev, less what no training may see."""
    rules = splits()["everyday"]
    dev, several = set(rules["held_out"]), set(rules["several_calls_left_out"])
    if not dev & {tool.source for tool in data.tools.values()} and not several & {r.source for r in data.calls}:
        return data
    tools = {key: replace(tool, split="dev") if tool.source in dev else tool for key, tool in data.tools.items()}
    calls = tuple(
        replace(record, split="dev") if record.source in dev else record
        for record in data.calls
        if not (record.source in several and len(record.calls) > 1)
    )
    return DataSet(tools, calls, data.alike)


def splits() -> dict[str, Any]:
    """Which tools and rows of the published sources are of split dev, and which are left out (`splits.yaml`)."""
    return yaml.safe_load((Path(__file__).parent / "splits.yaml").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_data(data: DataSet, folder: Path | str) -> None:
    """Write `tools.jsonl`, `calls_train.jsonl` and `calls_dev.jsonl` into `folder`, which is made if it is missing."""
    folder = Path(folder)
    _write_lines(folder / "tools.jsonl", map(asdict, data.tools.values()))
    for split in SPLITS:
        rows = (asdict(record) for record in data.calls if record.split == split)
        _write_lines(folder / f"calls_{split}.jsonl", rows)


def repair(data: DataSet, *, drop_unstated: Sequence[str] = ("seal-tools",)) -> DataSet:
    """Make calls and schemas agree, so that every gold call is one that its tool's schema allows.

    Published rows disagree with their schemas in three ways, each mended once for a tool, never for a single request,
    so that a schema tells nothing about the answer:

    - a value of another type ("36.9" for a number) is converted where nothing is lost, else the argument becomes
      a string;
    - an argument that the schema requires but that some call leaves out becomes optional;
    - training rows of the sources in `drop_unstated` lose arguments whose value their request does not state, and rows
      that refer to an earlier call's result by a place holder (`API_call_0`) are left out: learning them is learning
      to invent values. Rows of split dev keep theirs.
    """
    calls: list[CallRecord] = []
    for record in data.calls:
        if record.split == "train" and record.source in drop_unstated:
            if any("API_call_" in str(value) for call in record.calls for value in call.arguments.values()):
                continue
            kept = [
                Call(call.tool, {k: v for k, v in call.arguments.items() if states(record.query, v)})
                for call in record.calls
            ]
            record = replace(record, calls=tuple(kept))
        calls.append(record)

    as_text: dict[str, set[str]] = defaultdict(set)
    always: dict[str, set[str]] = {}
    for record in calls:
        for call in record.calls:
            tool = data.tools[call.tool]
            always[tool.id] = always.get(tool.id, set(tool.required)) & call.arguments.keys()
            for name, value in call.arguments.items():
                schema = tool.properties[name]
                if not fits_type(coerced(value, schema), schema):
                    as_text[tool.id].add(name)

    tools = {}
    for tool in data.tools.values():
        properties = dict(tool.properties)
        for name in as_text.get(tool.id, ()):
            description = properties[name].get("description")
            properties[name] = {"type": "string", **({"description": description} if description else {})}
        required = [name for name in tool.required if name in always.get(tool.id, set(tool.required))]
        parameters = {**tool.parameters, "type": "object", "properties": properties, "required": required}
        tools[tool.id] = replace(tool, parameters=parameters)

    def mended(call: Call) -> Call:
        properties = tools[call.tool].properties
        arguments = {}
        for name, schema in properties.items():
            if name in call.arguments:
                value = coerced(call.arguments[name], schema)
                text = name in as_text.get(call.tool, ()) and not isinstance(value, str)
                arguments[name] = json.dumps(value) if text else value
        return Call(call.tool, arguments)

    mended_calls = tuple(replace(record, calls=tuple(map(mended, record.calls))) for record in calls)
    return DataSet(tools, mended_calls, data.alike)
