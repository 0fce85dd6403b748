"""Builds requests and gold calls from templates with slots: the project's own tools, `computer_tools/*.yaml`.

A domain file holds tools; a tool says what it does (`about`), which arguments it takes (`args`) and how people ask
for it (`ask`, one template a line). The notation is described in `computer_tools/README.md`. This module reads the
files, checks them and fills the slots; values stand in `values.yaml`, frames of requests in `frames.yaml`.
"""

import functools
import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loragen_agents.data.records import Call, CallRecord, DataSet, Split, ToolRecord
from loragen_agents.errors import DataError

COMPUTER_TOOLS = Path(__file__).resolve().parent / "computer_tools"
SOURCE = "computer"
MIN_TEMPLATES = 20
_NOT_DOMAINS = {"values", "frames", "patterns"}
_SLOT = re.compile(r"\{(\w+)\}")
_GIVEN = " => "
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


@dataclass(frozen=True)
class Argument:
    """One argument of a templated tool: where its values come from, and its schema's words."""

    name: str
    values: str | tuple[str, ...]
    about: str

    def schema(self, book: "ValueBook") -> dict[str, Any]:
        """JSON Schema of the argument."""
        if isinstance(self.values, tuple):
            return {"type": "string", "enum": list(self.values), "description": self.about}
        return {"type": book.type_of(self.values), "description": self.about}


@dataclass(frozen=True)
class Template:
    """One way to ask: text with slots and choices, and the arguments that the text states without a slot."""

    text: str
    fixed: tuple[tuple[str, Any], ...] = ()

    @property
    def slots(self) -> tuple[str, ...]:
        """Argument names in the text, in order."""
        return tuple(dict.fromkeys(_SLOT.findall(self.text)))

    @property
    def arguments(self) -> frozenset[str]:
        """Names of all arguments that a request from this template states."""
        return frozenset(self.slots) | {name for name, _ in self.fixed}


@dataclass(frozen=True)
class TemplatedTool:
    """A tool with its arguments and the ways to ask for it."""

    name: str
    domain: str
    about: str
    arguments: tuple[Argument, ...]
    templates: tuple[Template, ...]

    @property
    def id(self) -> str:
        """Id in the intermediate format."""
        return f"{SOURCE}/{self.domain}.{self.name}"

    @property
    def split(self) -> Split:
        """About one tool in ten is held out; which ones follows from the id alone, so that adding tools moves none."""
        return "dev" if int(hashlib.sha256(self.id.encode()).hexdigest(), 16) % 10 == 0 else "train"

    def record(self, book: "ValueBook") -> ToolRecord:
        """The tool in the intermediate format; an argument is required where every template states it."""
        stated = [template.arguments for template in self.templates]
        parameters = {
            "type": "object",
            "properties": {argument.name: argument.schema(book) for argument in self.arguments},
            "required": [a.name for a in self.arguments if all(a.name in names for names in stated)],
        }
        return ToolRecord(self.id, self.name, self.about, self.domain, SOURCE, self.split, parameters)


@dataclass(frozen=True)
class Spoken:
    """A value that is said in other words than a call gives it."""

    said: str
    given: str | int | float | bool

    @classmethod
    def read(cls, text: str) -> "Spoken":
        """Read `said => given`; numbers, true and false are given as such."""
        said, _, given = text.partition(_GIVEN)
        return cls(said.strip(), _plain(given))

    def __str__(self) -> str:
        return self.said


def _given_type(value: Any) -> type:
    return type(value.given) if isinstance(value, Spoken) else type(value)


class ValueBook:
    """Named lists of slot values: texts, which may hold slots of other lists, or numbers.

    Args:
        lists: `name: [value, ...]`, `name: {from: 1, to: 60, step: 5}` for numbers, or `name: "one | two | three"`.
            Where people say a value otherwise than a call gives it, `said => given`: `half past seven => 07:30`.

    Raises:
        DataError: a list is empty, of mixed types, or refers to one that does not exist.
    """

    def __init__(self, lists: dict[str, Any]) -> None:
        self._lists: dict[str, list[Any]] = {name: self._read(name, value) for name, value in lists.items()}
        for name, values in self._lists.items():
            for value in values:
                for inner in _SLOT.findall(value) if isinstance(value, str) else ():
                    if inner not in self._lists:
                        raise DataError(
                            f"values.yaml: the list {name!r} refers to {inner!r}, which is not a list there"
                        )

    @staticmethod
    def _read(name: str, value: Any) -> list[Any]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split("|")]
        elif isinstance(value, dict) and {"from", "to"} <= value.keys():
            first, last, step = value["from"], value["to"], value.get("step", 1)
            count = int((last - first) / step + 1e-9) + 1
            value = [first + index * step for index in range(count)]
            value = [round(item, 6) if isinstance(item, float) else item for item in value]
        if isinstance(value, list):
            value = [Spoken.read(item) if isinstance(item, str) and _GIVEN in item else item for item in value]
        if not isinstance(value, list) or not value or len({_given_type(item) for item in value}) != 1:
            raise DataError(f"values.yaml: {name!r} must be a list of values of one type, 'a | b' or from/to/step")
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._lists

    def type_of(self, name: str) -> str:
        """JSON type of a list's values."""
        return {str: "string", int: "integer", float: "number", bool: "boolean"}[_given_type(self._lists[name][0])]

    def draw(self, name: str, rng: random.Random) -> Any:
        """Draw a value, slots in it filled; a `Spoken` one as it is."""
        value = rng.choice(self._lists[name])
        if not isinstance(value, str):
            return value
        return _SLOT.sub(lambda match: str(self.draw(match[1], rng)), value)


def _load_yaml(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path}: can't be read as YAML ({error})") from error


@functools.cache
def value_book(folder: Path = COMPUTER_TOOLS) -> ValueBook:
    """The value lists of `folder`."""
    return ValueBook(_load_yaml(folder / "values.yaml"))


def _read_argument(name: str, text: str, book: ValueBook, where: str) -> Argument:
    values, dash, about = text.partition(" - ")
    values = values.strip()
    if not dash or not about.strip():
        raise DataError(f"{where}: argument {name!r} must read 'VALUES - what it is', got {text!r}")
    if "|" in values:
        return Argument(name, tuple(part.strip() for part in values.split("|")), about.strip())
    if values not in book:
        raise DataError(f"{where}: argument {name!r} takes its values from {values!r}, which is not in values.yaml")
    return Argument(name, values, about.strip())


def _read_template(line: str, arguments: dict[str, Argument], where: str) -> Template:
    text, bars, tail = line.partition("||")
    template = Template(text.strip(), tuple(_read_fixed(part, where) for part in tail.split(";")) if bars else ())
    unknown = template.arguments - arguments.keys()
    if unknown:
        raise DataError(f"{where}: the template {line!r} states {', '.join(sorted(unknown))}, which is no argument")
    for name, value in template.fixed:
        values = arguments[name].values
        if isinstance(values, tuple) and value not in values:
            raise DataError(f"{where}: the template {line!r} sets {name} to {value!r}; expected one of {values}")
    if "|" in _CHOICE.sub("", text):
        raise DataError(f"{where}: the template {line!r} has a '|' outside of a choice: write (one|two)")
    return template


def _read_fixed(part: str, where: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise DataError(f"{where}: expected 'argument=value' behind '||', got {part!r}")
    return name.strip(), _plain(value)


def _plain(text: str) -> str | int | float | bool:
    """A value as it is written in these files; quotes keep a number a text."""
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return float(text)
    return text == "true" if text in ("true", "false") else text.strip('"')


def _pattern_lines(use: str, patterns: dict[str, str], where: str) -> list[str]:
    """Lines of a shared pattern, `name(thing=note, things=notes)`, with its <words> put in."""
    match = re.fullmatch(r"(\w+)\((.*)\)", use.strip())
    if not match or match[1] not in patterns:
        raise DataError(f"{where}: 'use' must read pattern(word=..., ...) with a pattern of patterns.yaml, got {use!r}")
    words = dict(part.strip().split("=", 1) for part in match[2].split(",")) if match[2].strip() else {}
    lines = []
    for line in patterns[match[1]].splitlines():
        try:
            lines.append(re.sub(r"<(\w+)>", lambda found: words[found[1]], line))
        except KeyError as error:
            raise DataError(f"{where}: the pattern {match[1]!r} needs {error.args[0]}=...") from error
    return lines


def read_domain(path: Path, book: ValueBook, patterns: dict[str, str]) -> list[TemplatedTool]:
    """Read one domain file.

    Raises:
        DataError: the file is not in the notation, or a tool has fewer than 20 different templates; file and tool are
            named.
    """
    content = _load_yaml(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a mapping of tool names to tools")
    tools = []
    for name, entry in content.items():
        where = f"{path.name}, tool {name}"
        if not isinstance(entry, dict) or not {"about", "ask"} <= entry.keys() <= {"about", "args", "use", "ask"}:
            raise DataError(f"{where}: expected 'about' and 'ask', and perhaps 'args' and 'use'")
        arguments = {key: _read_argument(key, text, book, where) for key, text in (entry.get("args") or {}).items()}
        lines = entry["ask"].splitlines()
        for use in [entry["use"]] if isinstance(entry.get("use"), str) else entry.get("use", []):
            lines += _pattern_lines(use, patterns, where)
        templates = tuple(_read_template(line, arguments, where) for line in lines if line.strip())
        different = {re.sub(r"\W+", " ", template.text.lower()).strip() for template in templates}
        if len(different) < MIN_TEMPLATES:
            raise DataError(f"{where}: {len(different)} different templates; expected at least {MIN_TEMPLATES}")
        unused = arguments.keys() - {argument for template in templates for argument in template.arguments}
        if unused:
            raise DataError(f"{where}: no template states {', '.join(sorted(unused))}")
        tools.append(TemplatedTool(name, path.stem, entry["about"], tuple(arguments.values()), templates))
    return tools


def read_computer_tools(folder: Path = COMPUTER_TOOLS) -> list[TemplatedTool]:
    """Read all domain files of `folder`, in alphabetical order.

    Raises:
        DataError: a file is not in the notation.
    """
    book, patterns = value_book(folder), _load_yaml(folder / "patterns.yaml")
    paths = sorted(path for path in folder.glob("*.yaml") if path.stem not in _NOT_DOMAINS)
    return [tool for path in paths for tool in read_domain(path, book, patterns)]


def fill(
    tool: TemplatedTool, template: Template, book: ValueBook, frames: dict[str, int], rng: random.Random
) -> CallRecord:
    """Fill a template: choices are made, a verb phrase (it opens with a small letter) is framed, slots are filled."""
    values: dict[str, Any] = {}
    arguments = {argument.name: argument for argument in tool.arguments}
    for name in template.slots:
        for _ in range(20):
            drawn = arguments[name].values
            values[name] = rng.choice(drawn) if isinstance(drawn, tuple) else book.draw(drawn, rng)
            # "Convert 3 km to km", "move it from here to here": two slots of a kind hold different things.
            if list(values.values()).count(values[name]) == 1:
                break
    text = template.text
    while _CHOICE.search(text):
        text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    text = re.sub(r"\s+([.,?!])", r"\1", re.sub(r"\s+", " ", text)).strip()
    if text[:1] == "~":
        text = text[1:].strip()
    elif text[:1].islower():
        frame = rng.choices(list(frames), list(frames.values()))[0]
        text = frame.replace("<vp>", text).replace("<Vp>", text[0].upper() + text[1:])
    elif text[-1:] in ".?" and rng.random() < 0.08:
        text = text[:-1]
    # A value may end in a full stop of its own.
    text = re.sub(r"([.!?])[.?]$", r"\1", _SLOT.sub(lambda match: str(values[match[1]]), text))
    written = {name: value.given if isinstance(value, Spoken) else value for name, value in values.items()}
    given = {**written, **dict(template.fixed)}
    ordered = {argument.name: given[argument.name] for argument in tool.arguments if argument.name in given}
    return CallRecord(text, (Call(tool.id, ordered),), SOURCE, tool.split)


def build_computer_tools(*, copies: int = 4, seed: int = 0, folder: Path = COMPUTER_TOOLS) -> DataSet:
    """Fill every template `copies` times; requests that come out the same are kept once.

    Raises:
        DataError: a domain file is not in the notation.
    """
    book, frames = value_book(folder), _load_yaml(folder / "frames.yaml")
    tools = read_computer_tools(folder)
    calls: list[CallRecord] = []
    for tool in tools:
        rng = random.Random(f"{seed}/{tool.id}")
        filled = (fill(tool, template, book, frames, rng) for template in tool.templates for _ in range(copies))
        calls += {record.query: record for record in filled}.values()
    return DataSet({tool.id: tool.record(book) for tool in tools}, tuple(calls))
