"""The examples on the embedded model: functions of one's own, an MCP server over stdio, the notebook's cells in turn.

Which tool the model would choose is forced where the example's own work is tested (agent.py: test_agent.py).
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import ToolMessage

from loragen_agents import LoRAGenChatModel

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_functions_are_called_with_what_the_request_says() -> None:
    example = load("own_functions")
    model = LoRAGenChatModel(tools=list(example.FUNCTIONS.values()), max_tokens=48)
    timer = model.model_copy(update={"tool_choice": "set_timer"})
    assert "rings in 5 minutes" in example.run_request(timer, "Set a timer for 5 minutes")
    length = model.model_copy(update={"tool_choice": "convert_length"})
    assert "12 miles are" in example.run_request(length, "Convert 12 miles to kilometres")
    none = model.model_copy(update={"tool_choice": "none"})
    assert example.run_request(none, "Hello!")


async def test_tools_of_an_mcp_server_are_called_over_stdio() -> None:
    pytest.importorskip("langchain_mcp_adapters")
    choices: Iterator[str] = iter(["count_notes", "none"])

    @wrap_model_call
    async def choose(request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> ModelResponse:
        return await handler(request.override(tool_choice=next(choices)))

    messages = await load("mcp_agent").ask("How many?", LoRAGenChatModel(max_tokens=32), middleware=[choose])
    assert [message.text for message in messages if isinstance(message, ToolMessage)] == ["There are 0 notes."]
    assert messages[-1].type == "ai" and messages[-1].text


def test_the_notebook_s_cells_run_in_turn() -> None:
    notebook = json.loads((EXAMPLES / "main_path.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"main_path.ipynb, {cell['id']}", "exec"), names)
    assert names["message"].tool_calls[0]["name"] == "set_timer"
    assert names["facts"]["prompt_tokens"] < names["facts"]["definition_tokens"]
    assert (names["folder"] / "adapter_model.safetensors").is_file()
