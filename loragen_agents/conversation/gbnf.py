"""The registry as a GBNF grammar for llama.cpp: what a model may write after `THOUGHT_QUESTION`, in other runtimes.

It says the same as `edge.grammar`, in llama.cpp's notation. Where GBNF has no words for a part of a schema (patterns,
bounds of numbers, combinations), the grammar allows all values of the type there, and a comment at its top says so:
what the model writes is then to be checked against the schema. Knows neither models nor tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loragen_agents.conversation.react import ACTION, ACTION_INPUT, ANSWER, NO_TOOL, OBSERVATION_STOP, USE_TOOL
from loragen_agents.registry import Tool, ToolRegistry, json_schema
from loragen_agents.registry.arguments import is_free_text

# Longer repetitions make llama.cpp's parser slow; beyond it a bound is not held.
_MOST_REPEATED = 256
_SHARED = {
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ( pair ( ", " pair )* )? "}"',
    "pair": 'string ": " value',
    "array": '"[" ( value ( ", " value )* )? "]"',
    "string": r'"\"" char* "\""',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" ["\\bfnrt]',
    "number": 'integer ( "." [0-9]+ )? ( [eE] [-+]? [0-9]+ )?',
    "integer": '"-"? ( "0" | [1-9] [0-9]* )',
    "boolean": '"true" | "false"',
    "null": '"null"',
}
_NEEDS = {
    "value": ("object", "array", "string", "number", "boolean", "null"),
    "object": ("pair",),
    "pair": ("string", "value"),
    "array": ("value",),
    "string": ("char",),
    "number": ("integer",),
}
# Keywords that the rules follow, or that say nothing about the value.
_HELD = frozenset(
    {"type", "enum", "const", "properties", "required", "items", "minItems", "maxItems", "minLength", "maxLength"}
    | {"anyOf", "oneOf", "$ref", "$defs", "definitions", "additionalProperties"}
    | {"title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "deprecated"}
    | {"readOnly", "writeOnly", "nullable", "strict"}
)


def tool_gbnf(registry: ToolRegistry) -> str:
    """The grammar of one step as GBNF text: a call of one of the tools, or an answer.

    The prompt in front of it ends in `THOUGHT_QUESTION`. A call ends with `Observation:`, which a stop text can
    cut off.
    """
    writer = _Writer()
    names = [writer.tool(tool, f"tool{number}", registry.input_format) for number, tool in enumerate(registry)]
    starts = []
    if names:
        starts.append("call")
        head = _literal(f"{USE_TOOL}{ACTION} ")
        writer.rules["call"] = f"{head} ( {' | '.join(names)} ) {_literal(OBSERVATION_STOP)}"
    writer.rules["answer"] = rf"{_literal(f'{NO_TOOL}{ANSWER} ')} [^\x00-\x20] [^\x00]*"
    rules = {"root": " | ".join([*starts, "answer"]), **writer.rules}
    lines = [f"# not held: {note}" for note in dict.fromkeys(writer.notes)]
    return "\n".join([*lines, *(f"{name} ::= {rule}" for name, rule in rules.items())]) + "\n"


class _Writer:
    """Collects the rules of a grammar; `notes` lists the parts of schemas that the rules do not hold."""

    def __init__(self) -> None:
        self.rules: dict[str, str] = {}
        self.notes: list[str] = []
        self._root: Mapping[str, Any] = {}
        self._references: dict[str, str] = {}
        self._where = ""

    def tool(self, tool: Tool, rule: str, input_format: str) -> str:
        """Add the rules for `NAME\\nAction Input: INPUT` of one tool; return the name of their top."""
        self._root, self._references, self._where = tool.parameters, {}, f"tool {tool.name}"
        body = self._csv(tool) if input_format == "csv" else self._schema(tool.parameters, rule)
        self.rules[rule] = f"{_literal(f'{tool.name}{ACTION_INPUT} ')} {body}"
        return rule

    def _use(self, name: str) -> str:
        """Name a shared rule, and see that it and what it needs are written."""
        if name not in self.rules:
            self.rules[name] = _SHARED[name]
            for needed in _NEEDS.get(name, ()):
                self._use(needed)
        return name

    def _note(self, schema: Mapping[str, Any], held: frozenset[str] = _HELD) -> None:
        for keyword in schema.keys() - held:
            self.notes.append(f"{self._where}: {keyword}")

    def _schema(self, schema: Any, rule: str) -> str:
        """An expression for the values of a schema; `rule` begins the names of rules that it needs."""
        if schema is True or schema == {}:
            return self._use("value")
        if not isinstance(schema, Mapping):  # the schema `false`: nothing is admitted
            self.notes.append(f"{self._where}: a schema that admits nothing")
            return self._use("value")
        if "$ref" in schema:
            return self._reference(schema["$ref"], rule)
        values = json_schema.constants(schema)
        if values is not None:
            return _choice([_literal(json.dumps(value, ensure_ascii=False)) for value in values])
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                around = {key: value for key, value in schema.items() if key != keyword}
                options = [
                    {**around, **option} if isinstance(option, Mapping) else option for option in schema[keyword]
                ]
                return _choice([self._schema(option, f"{rule}-{number}") for number, option in enumerate(options)])
        self._note(schema)
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            return self._use("value")
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        return _choice([self._kind(kind, schema, rule) for kind in kinds])

    def _reference(self, reference: str, rule: str) -> str:
        if reference not in self._references:
            name = self._references[reference] = f"{rule}-ref{len(self._references)}"
            self.rules[name] = self._schema(json_schema.resolve(reference, self._root), name)
        return self._references[reference]

    def _kind(self, kind: str, schema: Mapping[str, Any], rule: str) -> str:
        if kind == "object" and schema.get("properties"):
            return self._object(schema, rule)
        if kind == "object" and "additionalProperties" in schema and schema["additionalProperties"] is not True:
            inner = schema["additionalProperties"]
            if inner is False:
                return _literal("{}")
            pair = f'{self._use("string")} ": " {self._schema(inner, f"{rule}-value")}'
            return f'"{{" ( {pair} ( ", " {pair} )* )? "}}"'
        if kind == "object" and "properties" in schema and "additionalProperties" not in schema:
            return _literal("{}")
        if kind == "array" and ("items" in schema or "minItems" in schema or "maxItems" in schema):
            return self._array(schema, rule)
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            self._use("char")
            return rf'"\"" char{self._bounds(schema, "minLength", "maxLength", 0)} "\""'
        return self._use(kind)

    def _object(self, schema: Mapping[str, Any], rule: str) -> str:
        """Properties in the schema's order, those that are not required with or without."""
        if schema.get("additionalProperties", False) is not False:
            self.notes.append(f"{self._where}: properties that the schema allows but does not list are never written")
        needed = set(schema.get("required", ()))
        pairs = [
            (
                f"{_literal(json.dumps(name, ensure_ascii=False) + ': ')} {self._schema(inner, f'{rule}-{number}')}",
                name in needed,
            )
            for number, (name, inner) in enumerate(schema["properties"].items())
        ]
        # Which property comes first decides which of the others still can come; each of these has a comma before it.
        starts: list[str] = []
        for place, (pair, required) in enumerate(pairs):
            rest = [f'", " {other}' if must else f'( ", " {other} )?' for other, must in pairs[place + 1 :]]
            starts.append(" ".join([pair, *rest]))
            if required:
                break
        else:
            starts.append('""')
        self.rules[f"{rule}-object"] = f'"{{" {_choice(starts)} "}}"'
        return f"{rule}-object"

    def _array(self, schema: Mapping[str, Any], rule: str) -> str:
        self.rules[f"{rule}-item"] = self._schema(schema.get("items", True), f"{rule}-items")
        fewest, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return _literal("[]")
        more = self._bounds(schema, "minItems", "maxItems", 1)
        filled = f'{rule}-item ( ", " {rule}-item ){more}'
        return f'"[" {filled} "]"' if fewest else f'"[" ( {filled} )? "]"'

    def _bounds(self, schema: Mapping[str, Any], least: str, most: str, taken: int) -> str:
        """A repetition between the bounds of a schema, less what stands before it."""
        low, high = max(0, schema.get(least, 0) - taken), schema.get(most)
        if max(low, high or 0) > _MOST_REPEATED:
            self.notes.append(f"{self._where}: {least} and {most}")
            return "*"
        return f"{{{low},}}" if high is None else f"{{{low},{max(low, high - taken)}}}"

    def _csv(self, tool: Tool) -> str:
        names = tool.argument_names
        values = [self._csv_value(tool, name, place == len(names) - 1) for place, name in enumerate(names)]
        fewest = max((place + 1 for place, name in enumerate(names) if name in tool.required), default=0)
        return _choice([' ", " '.join(values[:count]) or '""' for count in range(fewest, len(names) + 1)])

    def _csv_value(self, tool: Tool, name: str, last: bool) -> str:
        schema = tool.parameters["properties"][name]
        values = json_schema.constants(schema) if isinstance(schema, Mapping) else None
        if values is not None:
            return _choice([_literal(value if isinstance(value, str) else json.dumps(value)) for value in values])
        if isinstance(schema, Mapping):
            self._note(schema)
        kinds = tool.types_of(name)
        choices = [self._use(kind) for kind in ("number", "boolean", "null") if kind in kinds]
        if "integer" in kinds and "number" not in kinds:
            choices.append(self._use("integer"))
        if "string" in kinds:
            # As in `edge.grammar`: begins and ends with something to see; commas stay where nothing can follow.
            inner = "" if last and is_free_text(tool, name) else ","
            choices.append(rf"[^\x00-\x20,{{\x7F] ( [^{inner}\x00-\x08\x0A-\x1F\x7F]* [^\x00-\x20,\x7F] )?")
        return _choice(choices)


def _choice(options: Sequence[str]) -> str:
    return options[0] if len(options) == 1 else f"( {' | '.join(options)} )"


def _literal(text: str) -> str:
    """Text as GBNF writes it; line ends, quotes and control characters as escapes."""
    escaped = (
        text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    )
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
