"""The last turn's first step again, with the tool definitions in the prompt: what one would do without this project.

Both steps are decoded by the same model on the same machine, both held to the grammar with scored names.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import BaseTool

from loragen_agents.assistant.turns import Turn, history


@dataclass(frozen=True)
class Side:
    """One way to decode the step: its text, and what it took."""

    title: str
    step: str
    prompt_tokens: int
    first_token_ms: float
    step_ms: float


def compare(
    model: Any, tools: Sequence[BaseTool], system: str, turns: list[Turn], history_turns: int
) -> tuple[Side, Side]:
    """The last of `turns` with the tools in the weights, and with their definitions in the prompt.

    Args:
        model: the assistant's `LoRAGenChatModel`, with its edge LM loaded.
    """
    earlier, turn = turns[:-1], turns[-1]
    messages = [
        *([SystemMessage(system)] if system else []),
        *history(earlier, history_turns),
        HumanMessage(turn.request),
    ]
    return _in_weights(model, tools, messages), _in_prompt(model, tools, messages)


def _in_weights(model: BaseChatModel, tools: Sequence[BaseTool], messages: list[Any]) -> Side:
    started = time.perf_counter()
    message: Any = model.bind_tools(tools).invoke(messages)
    took = (time.perf_counter() - started) * 1000
    facts = message.response_metadata
    if message.tool_calls:
        made = message.tool_calls[0]
        step = _call_text(made["name"], made["args"])
    else:
        step = message.text
    return Side("tools in the weights", step, facts["prompt_tokens"], facts["first_token_ms"], took)


def _in_prompt(model: Any, tools: Sequence[BaseTool], messages: list[Any]) -> Side:
    from loragen_agents.chat.messages import read_conversation
    from loragen_agents.conversation.react import Answer, ToolStep, parse_step
    from loragen_agents.edge.sampling import Sampling
    from loragen_agents.edge.specialized import SpecializedLM
    from loragen_agents.registry import ToolRegistry

    registry = ToolRegistry.from_tools(tools)
    conversation = read_conversation(messages, registry)
    bare = SpecializedLM(model.model, None, registry)
    prompt = bare.renderer.full_react(registry, conversation.turns, conversation.system_text)
    started = time.perf_counter()
    (completion,) = bare.decoder.generate([prompt], Sampling(max_tokens=model.max_tokens), bare.grammar())
    took = (time.perf_counter() - started) * 1000
    step = parse_step(completion.text, registry, cut_off=completion.finish_reason != "stop")
    if isinstance(step, ToolStep):
        text = _call_text(step.action, step.arguments)
    else:
        text = step.text if isinstance(step, Answer) else f"(can't be read: {step.error})"
    first = (completion.first_token_seconds or 0.0) * 1000
    return Side("definitions in the prompt", text, completion.prompt_tokens, first, took)


def _call_text(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


Compare = Callable[[Any, Sequence[BaseTool], str, list[Turn], int], tuple[Side, Side]]
