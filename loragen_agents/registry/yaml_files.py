"""Registry files: YAML in, YAML out, and errors that say which line is wrong.

The YAML is read by the rules of YAML 1.2's core schema rather than PyYAML's 1.1: a choice `[yes, no]` stays text,
`1:30` is no number and `2024-01-01` no date. A duplicate key is an error. Knows the layout of a registry file; `tool`
decides what a usable tool is, and `registry` which tools go together.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loragen_agents.errors import RegistryError
from loragen_agents.registry.tool import InputFormat, Tool
from loragen_agents.support.files import replacing

# Bounds on a file, far above every honest one: 5,000 tools take about 2 MB and 200,000 nodes.
_MAX_BYTES = 4_000_000
_MAX_DEPTH = 100
# Nodes with every alias written out; a few hundred bytes can stand for billions.
_MAX_NODES = 300_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars, and a bound on the depth of what it reads."""

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.depth >= _MAX_DEPTH:
            mark = self.get_mark()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {_MAX_DEPTH} levels; write it flatter", problem_mark=mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes a value twice rather than as an anchor and an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> ScalarNode:
        # PyYAML writes U+0085 unescaped into single quotes, and reads it back as a line feed. Double quotes escape it,
        # and U+2028 and U+2029 too, which YAML 1.1 takes for line breaks and 1.2 does not.
        return self.represent_scalar("tag:yaml.org,2002:str", data, '"' if _BREAKS.search(data) else None)


_BREAKS = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(str, _Dumper.represent_text)

# A number with a leading zero, such as a code, stays text: YAML 1.1 and 1.2 read it differently.
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
    # Text is quoted wherever either version of YAML would take it for something else.
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class RegistryFile:
    """What a registry file holds: the input format, and each tool with the line on which it begins."""

    input_format: InputFormat
    tools: tuple[tuple[Tool, int], ...]


def read_registry_file(path: Path) -> RegistryFile:
    """Read a registry file.

    Raises:
        RegistryError: what is wrong, with file, line and what was expected there.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise RegistryError(f"{path}: larger than {_MAX_BYTES:,} bytes; expected a registry of tools")
        text = content.decode()
    except OSError as error:
        raise RegistryError(f"{path}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RegistryError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        reader = _Reader(path, loader)
        if root is not None:
            reader.check_size(root)
        return reader.content(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RegistryError(f"{path}, line {line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RegistryError(f"{path}, line {line}: YAML can't hold the character {text[error.position]!r}") from error
    except RecursionError as error:
        raise RegistryError(f"{path}: nested too deeply, or an anchor holds itself; write it out flat") from error
    finally:
        if loader is not None:
            loader.dispose()


def write_registry_file(tools: Iterable[Tool], input_format: InputFormat, path: Path) -> None:
    """Write tools so that `read_registry_file` gives them back as they are."""
    content = {"input_format": input_format, "tools": [tool.model_dump() for tool in tools]}
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class _Reader:
    """Turns YAML nodes into values. Nodes, unlike values, know their lines, which error messages need."""

    def __init__(self, path: Path, loader: _Loader) -> None:
        self.path = path
        self.loader = loader

    def fail(self, node: Node, message: str) -> NoReturn:
        raise RegistryError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def content(self, root: Node | None) -> RegistryFile:
        if root is None:
            raise RegistryError(f"{self.path}, line 1: the file is empty; expected 'input_format' and a list 'tools'")
        fields = self.fields(root, "the file", ("input_format", "tools"))
        if "tools" not in fields:
            self.fail(root, "the list 'tools' is missing")
        formats = get_args(InputFormat)
        input_format: Any = "json"
        if "input_format" in fields:
            input_format = self.value(fields["input_format"])
            if input_format not in formats:
                self.fail(fields["input_format"], f"input_format is {input_format!r}; expected 'csv' or 'json'")
        if not isinstance(fields["tools"], SequenceNode):
            self.fail(fields["tools"], "'tools' is no list; expected one entry '- name: ...' for each tool")
        tools = tuple((self.tool(node), node.start_mark.line + 1) for node in fields["tools"].value)
        return RegistryFile(input_format, tools)

    def tool(self, node: Node) -> Tool:
        fields = self.fields(node, "a tool", ("name", "description", "parameters"))
        for key in ("name", "description"):
            if key not in fields:
                self.fail(node, f"a tool without {key!r}; expected name, description and, if it takes any, parameters")
            if not isinstance(fields[key], ScalarNode) or not isinstance(self.value(fields[key]), str):
                self.fail(fields[key], f"the {key} of a tool must be text; quote it if it looks like a number")
        if "parameters" in fields and not isinstance(fields["parameters"], MappingNode):
            self.fail(fields["parameters"], "parameters must be a JSON Schema of 'type: object' with 'properties'")
        values = {key: self.value(field) for key, field in fields.items()}
        try:
            return Tool(**values)
        except RegistryError as error:
            self.fail(node, str(error))

    def check_size(self, root: Node) -> None:
        """Refuse a tree that would be too large with every alias written out, or never end."""
        sizes: dict[int, int] = {}

        def size(node: Node, parents: frozenset[int]) -> int:
            if id(node) in parents:
                self.fail(node, "an anchor holds itself; write the value out")
            if id(node) not in sizes:
                children: list[Node] = node.value if isinstance(node, SequenceNode) else []
                if isinstance(node, MappingNode):
                    children = [child for pair in node.value for child in pair]
                sizes[id(node)] = 1 + sum(size(child, parents | {id(node)}) for child in children)
            if sizes[id(node)] > _MAX_NODES:
                self.fail(node, f"more than {_MAX_NODES:,} values once its aliases are written out; use fewer aliases")
            return sizes[id(node)]

        size(root, frozenset())

    def fields(self, node: Node, what: str, known: tuple[str, ...]) -> dict[str, Node]:
        if not isinstance(node, MappingNode):
            self.fail(node, f"{what} must be a mapping with the keys {', '.join(known)}")
        self.loader.flatten_mapping(node)
        fields: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node)
            if key not in known:
                self.fail(key_node, f"{what} has the unknown key {key!r}; expected {', '.join(known)}")
            if key in fields:
                self.fail(key_node, f"{what} has the key {key!r} twice; keep one")
            fields[key] = value_node
        return fields

    def value(self, node: Node) -> Any:
        self.check_keys(node)
        return self.loader.construct_object(node, deep=True)

    def check_keys(self, node: Node) -> None:
        if isinstance(node, MappingNode):
            seen: set[str] = set()
            for key_node, value_node in node.value:
                if isinstance(key_node, ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                    if key_node.value in seen:
                        self.fail(key_node, f"the key {key_node.value!r} stands here twice; keep one")
                    seen.add(key_node.value)
                self.check_keys(value_node)
        elif isinstance(node, SequenceNode):
            for item in node.value:
                self.check_keys(item)
