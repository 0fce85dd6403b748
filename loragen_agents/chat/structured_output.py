"""From a forced tool call to the object that `with_structured_output` promises.

LangChain's own parsers give None where there is no call. Here a call that is missing or could not be read is an error
with the reason. Knows schemas and tool calls, not the model.
"""

from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from loragen_agents.errors import RegistryError


def schema_tool(schema: Any) -> dict[str, Any]:
    """The OpenAI dict of the tool whose arguments are `schema` (pydantic class, TypedDict, JSON Schema, OpenAI dict).

    A schema without a description gets a plain one, which tells the model no more than the name does.

    Raises:
        RegistryError: LangChain can't read the schema as a tool.
    """
    try:
        definition = convert_to_openai_tool(schema)
    except Exception as error:
        raise RegistryError(
            f"{schema!r} can't be used for structured output ({error}); expected a pydantic class, a TypedDict or a "
            "JSON Schema with a title"
        ) from error
    function = definition["function"]
    if not function.get("description"):
        function["description"] = f"Give the {function['name']}."
    return definition


def output_parser(schema: Any, name: str) -> BaseOutputParser[Any]:
    """The parser that reads the call of the tool `name` as an instance of `schema` (a dict where it is no class)."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _PydanticParser(tools=[schema], first_tool_only=True)
    return _DictParser(key_name=name, first_tool_only=True)


class _PydanticParser(PydanticToolsParser):
    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        _require_call(result, partial)
        return super().parse_result(result, partial=partial)


class _DictParser(JsonOutputKeyToolsParser):
    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        _require_call(result, partial)
        return super().parse_result(result, partial=partial)


def _require_call(result: list[Generation], partial: bool) -> None:
    """Raise unless there is a call, or one may still come (`partial`, and the last chunk has not)."""
    message = result[0].message if isinstance(result[0], ChatGeneration) else None
    if getattr(message, "tool_calls", None):
        return
    for call in getattr(message, "invalid_tool_calls", None) or ():
        reason = call.get("error") or getattr(message, "response_metadata", {}).get("invalid_step")
        raise OutputParserException(f"the model's output could not be read: {reason}", llm_output=call.get("args"))
    if not partial or getattr(message, "chunk_position", None) == "last":
        raise OutputParserException("the model gave an answer in words, not the object", llm_output=result[0].text)
