"""An agent with three working tools on a local model: python examples/agent.py ["What is 12 * 7?"]

The tools are a calculator, a file reader and the date. Their definitions are turned into weights once; every prompt of
the agent then holds the conversation alone.
"""

import argparse
import ast
import operator
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_core.tools import BaseTool, StructuredTool, tool

from loragen_agents import LoRAGenChatModel
from loragen_agents.support.console import say

QUESTIONS = (
    "What is 17 * 23 + 4?",
    "What is the date today?",
    "What does the file shopping.txt say?",
)
FILES_FOLDER = Path(__file__).parent / "files"

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
# 9 ** 9 ** 9 would keep the machine busy for years.
_LARGEST_EXPONENT = 1000
_LARGEST_BASE = 10**6


@tool
def calculator(expression: str) -> str:
    """Work out an arithmetic expression with numbers, + - * / // % ** and brackets."""
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (ArithmeticError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return f"Error: {expression!r} can't be worked out: {error}"


@tool
def current_date() -> str:
    """Tell today's date and the day of the week."""
    return f"{date.today():%A, %Y-%m-%d}"


def file_reader(folder: Path) -> BaseTool:
    """A tool that reads the text files of `folder`, and no others: its argument is one of their names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())

    def read_file(name: str) -> str:
        if name not in names:
            return f"Error: there is no file {name!r}; there are {', '.join(names)}"
        return (folder / name).read_text(encoding="utf-8", errors="replace")[:2000].strip()

    return StructuredTool.from_function(
        read_file,
        name="read_file",
        description="Read one of the user's text files and tell what it says.",
        args_schema={
            "type": "object",
            "properties": {"name": {"type": "string", "enum": names, "description": "the file's name"}},
            "required": ["name"],
        },
    )


def build_agent(model: LoRAGenChatModel, folder: Path = FILES_FOLDER, **options: Any) -> Any:
    """An agent with the three tools; `options` are those of `create_agent`."""
    return create_agent(model, tools=[calculator, file_reader(folder), current_date], **options)


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))  # type: ignore[no-any-return]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > _LARGEST_EXPONENT or abs(left) > _LARGEST_BASE):
            raise ValueError("the numbers are too large")
        if isinstance(node.op, ast.Pow) and left < 0 and not float(right).is_integer():
            raise ValueError("the root of a negative number is not real")
        return _OPERATORS[type(node.op)](left, right)  # type: ignore[no-any-return]
    raise ValueError("only numbers, + - * / // % ** and brackets are known")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="*", help="what to ask; without it, one question for each tool")
    questions = parser.parse_args().question or QUESTIONS
    agent = build_agent(LoRAGenChatModel())
    for question in questions:
        say(f"\n{question}", style="bold")
        for message in agent.invoke({"messages": [("human", question)]})["messages"][1:]:
            if isinstance(message, AIMessage):
                for call in message.tool_calls:
                    say(f"  calls {call['name']} {call['args']}", style="cyan")
                for failed in message.invalid_tool_calls:
                    say(f"  a call that can't be read: {failed['error']}", style="red")
                if message.text:
                    say(f"  answers: {message.text}", style="green")
                facts = message.response_metadata
                say(
                    f"    {facts['prompt_tokens']} prompt tokens, {facts['definition_tokens']} in the weights, "
                    f"first token after {facts['first_token_ms']:.0f} ms",
                    style="dim",
                )
            else:
                say(f"  {message.name} reports: {message.text}", style="yellow")


if __name__ == "__main__":
    main()
