"""Holds a call to the arguments that its request gives, as far as their reader is sure.

A small model fills in arguments that nobody spoke of, and forgets others. Where the reader is sure that an argument is
given, the grammar demands it; where it is sure that it is not, the grammar has no place for it; in between, and for
whatever the schema demands itself, the model decides. Knows schemas and probabilities; no models.
"""

from collections.abc import Mapping

from loragen_agents.registry import Tool

# The likelier answer counts; other bounds, with a band between them that is left to the model, were not tried.
SURE_GIVEN, SURE_NOT_GIVEN = 0.5, 0.5
# A schema with other keywords may speak of arguments that are not there any more.
_PLAIN = {"type", "properties", "required", "additionalProperties", "title", "description"}
_PLAIN |= {"$schema", "$defs", "definitions"}


def can_be_held(tool: Tool) -> bool:
    """Whether a tool has optional arguments, and a schema in which they can be demanded or left out."""
    return tool.parameters.keys() <= _PLAIN and not tool.required.issuperset(tool.argument_names)


def held_arguments(tool: Tool, given: Mapping[str, float]) -> tuple[frozenset[str], frozenset[str]]:
    """The optional arguments that a call has to give, and those that it can't.

    Args:
        tool: that is called.
        given: how likely the request gives each argument, by name.
    """
    if not can_be_held(tool):
        return frozenset(), frozenset()
    optional = {name: given[name] for name in tool.argument_names if name in given and name not in tool.required}
    demanded = frozenset(name for name, likely in optional.items() if likely >= SURE_GIVEN)
    return demanded, frozenset(name for name, likely in optional.items() if likely < SURE_NOT_GIVEN)


def narrowed(tool: Tool, demanded: frozenset[str], refused: frozenset[str]) -> Tool:
    """The tool with some arguments required and some left out, as `held_arguments` gives them."""
    properties = {name: schema for name, schema in tool.parameters["properties"].items() if name not in refused}
    required = [name for name in properties if name in tool.required or name in demanded]
    return tool.model_copy(update={"parameters": {**tool.parameters, "properties": properties, "required": required}})
