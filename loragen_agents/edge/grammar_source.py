"""The text of a registry's grammar: the lines of a step, the tools' names and how each tool's input is written.

Written in llguidance's dialect of Lark, in which JSON Schema is understood. JSON inputs go by `held_schemas`, csv
inputs by the rules here. Both may admit more than a tool's own schema does, never less of what the notation can hold;
the parser checks the finished call.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NoReturn

import llguidance

from loragen_agents.conversation.react import answer_text, tool_step_text
from loragen_agents.edge.held_schemas import brief, held_numbers, held_parameters, json_rule
from loragen_agents.errors import GrammarError
from loragen_agents.registry import Tool, ToolRegistry, json_schema
from loragen_agents.registry.arguments import is_free_text
from loragen_agents.registry.csv_values import BREAKS, fits_csv, scalar_text

ToolChoice = Literal["auto", "any", "none"] | str

# Longer bounds on the length of a csv text cost seconds to build, or can't be built.
_COUNTED = 200
# Stand-ins for the parts of a step's lines that vary.
_NAME, _INPUT, _TEXT = "NAME", "INPUT", "TEXT"


@lru_cache(maxsize=32)
def grammar_source(registry: ToolRegistry, tool_choice: ToolChoice) -> str:
    """The grammar of one step in Lark; kept, since every tool's rules are compiled once to be checked.

    Args:
        registry: the tools, and the notation of their inputs.
        tool_choice: "auto" (a call or an answer), "any" (a call), "none" (an answer) or the name of the tool to call.

    Raises:
        GrammarError: an unknown tool choice, a call asked of an empty registry, or a tool that no call can be right
            for, named with its argument.
    """
    tools = _chosen(registry, tool_choice)
    rules: list[str] = []
    starts: list[str] = []
    before_name, before_input, before_report = _split(tool_step_text(_NAME, _INPUT), _NAME, _INPUT)
    for number, tool in enumerate(tools):
        own = [
            f"t{number}: {_literal(tool.name + before_input)} t{number}_input",
            *_input_rules(tool, number, registry),
        ]
        _check_tool(tool, own, f"t{number}")
        rules += own
    if tools:
        starts.append("call")
        names = " | ".join(f"t{number}" for number in range(len(tools)))
        rules += [f"call: {_literal(before_name)} tool {_literal(before_report)}", f"tool: {names}"]
    if tool_choice in ("auto", "none"):
        starts.append("answer")
        before_answer, _ = _split(answer_text(_TEXT), _TEXT)
        # An answer begins with a visible character; after that, any text goes, line breaks included.
        rules += [f"answer: {_literal(before_answer)} ANSWER", r"ANSWER: /\S(?s:.)*/"]
    return "\n".join(["%llguidance {}", "start: " + " | ".join(starts), *rules]) + "\n"


def _chosen(registry: ToolRegistry, tool_choice: ToolChoice) -> tuple[Tool, ...]:
    if tool_choice == "none":
        return ()
    if tool_choice == "any" and not len(registry):
        raise GrammarError("tool choice 'any' asks for a call, but the registry has no tools; give it some, or 'auto'")
    if tool_choice in ("auto", "any"):
        return registry.tools
    if tool_choice in registry:
        return (registry[tool_choice],)
    raise GrammarError(
        f"unknown tool choice {tool_choice!r}: expected 'auto', 'any', 'none' or one of "
        f"{', '.join(registry.names) or 'no tools'}"
    )


def _split(text: str, *parts: str) -> list[str]:
    """What stands before, between and behind `parts` in `text`."""
    found = []
    for part in parts:
        before, _, text = text.partition(part)
        found.append(before)
    return [*found, text]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(tool: Tool, cause: str) -> NoReturn:
    raise GrammarError(
        f"tool {tool.name!r}: the grammar can't hold its arguments: {cause}; mend the schema, or decode without a "
        "grammar"
    )


def _check_tool(tool: Tool, rules: list[str], start: str) -> None:
    """Compile one tool's rules without a tokenizer, so that an error is known to be this tool's."""
    source = "\n".join(["%llguidance {}", f"start: {start}", *rules])
    message = llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_lark(source))
    if message:
        _refuse(tool, brief(message))


def _input_rules(tool: Tool, number: int, registry: ToolRegistry) -> Iterator[str]:
    """Rules for the input of the tool with this number; `tN_input` is their top."""
    rule = f"t{number}"
    if registry.input_format == "csv":
        yield from _csv_rules(tool, rule)
        return
    try:
        yield f"{rule}_input: {json_rule(held_parameters(tool.parameters))}"
    except json_schema.SchemaError as error:
        _refuse(tool, str(error))


def _csv_rules(tool: Tool, rule: str) -> Iterator[str]:
    names = tool.argument_names
    for place, name in enumerate(names):
        # A text keeps its commas where nothing can follow it: a lexer could not tell where else it ends.
        commas = place == len(names) - 1 and is_free_text(tool, name)
        yield from _csv_value_rules(tool, name, f"{rule}_{place}", commas)
    fewest = max((place + 1 for place, name in enumerate(names) if name in tool.required), default=0)
    counts = range(fewest, len(names) + 1)
    lines = [' ", " '.join(f"{rule}_{place}" for place in range(count)) or '""' for count in counts]
    yield f"{rule}_input: " + " | ".join(lines)


def _csv_value_rules(tool: Tool, argument: str, rule: str, commas: bool) -> Iterator[str]:
    """Rules for one value of a csv input: a constant, a number, true, false, null, or text without a line break."""
    choices: list[str] = []
    words: list[str] = []
    for number, plain in enumerate(_alternatives(tool.parameters["properties"][argument])):
        values = json_schema.constants(plain)
        if values is not None:
            words += [scalar_text(value) for value in values if fits_csv(value)]
            continue
        kinds = json_schema.admitted_types(plain, tool.parameters)
        if "number" in kinds or "integer" in kinds:
            choices.append(json_rule(held_numbers(plain, "number" if "number" in kinds else "integer")))
        words += ["true", "false"] if "boolean" in kinds else []
        words += ["null"] if "null" in kinds else []
        if "string" in kinds:
            terminal = f"{rule.upper()}_TEXT{number}"
            yield f"{terminal}: {_text_regex(plain, commas)}"
            choices.append(terminal)
    if words:
        # One terminal for all: as rules of their own, a few thousand of them are too many for llguidance.
        terminal = f"{rule.upper()}_WORDS"
        yield f"{terminal}: " + " | ".join(map(_literal, dict.fromkeys(words)))
        choices.append(terminal)
    if not choices:
        _refuse(tool, f"the argument {argument!r} admits no value that csv can hold")
    yield f"{rule}: " + " | ".join(dict.fromkeys(choices))


def _alternatives(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The alternatives of a schema, each without anyOf and oneOf."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):  # the schema `false`: nothing is admitted
        return
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            around = {key: value for key, value in schema.items() if key != keyword}
            for option in schema[keyword]:
                if isinstance(option, Mapping):
                    yield from _alternatives({**around, **option})
                elif option is True:
                    yield from _alternatives(around)
            return
    yield schema


def _text_regex(schema: Mapping[str, Any], commas: bool) -> str:
    """A value begins and ends with a visible character that is no comma: the parser strips blanks around commas.

    It does not begin with a brace: a model that was trained on both formats would slip into JSON there.
    """
    inner = "" if commas else ","
    regex = rf"/[^\s,{{{BREAKS}]([^{inner}{BREAKS}]*[^\s,{BREAKS}])?/"
    fewest, most = min(schema.get("minLength", 0), _COUNTED), schema.get("maxLength", "")
    if most != "" and most > _COUNTED:
        most = ""
    if fewest or most != "":
        regex += f" & /(?s:.){{{fewest},{most}}}/"
    return regex
