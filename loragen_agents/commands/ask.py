"""`loragen-agents ask`: one step of the specialised model for a request, with what it took."""

import argparse
from typing import Any

from loragen_agents.commands.options import UNTRAINED, add_specialization_options, load_parts, load_registry

NAME = "ask"
HELP = "ask a model that is specialised on a tool registry, and show its step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_specialization_options(parser)
    parser.add_argument("request", help="what the user says")
    parser.add_argument("--tool-choice", default="auto", metavar="CHOICE", help="auto, any, none or a tool's name")
    parser.add_argument("--no-grammar", action="store_true", help="decode freely")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens of the step (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) decodes greedily")
    parser.add_argument("--seed", type=int, help="seed of the sampling")


def run(arguments: argparse.Namespace) -> int:
    from langchain_core.messages import HumanMessage, SystemMessage

    from loragen_agents.chat.chat_models import LoRAGenChatModel
    from loragen_agents.chat.steps import StepOutcome
    from loragen_agents.support.console import print_json
    from loragen_agents.support.progress import shown, silent

    registry = load_registry(arguments.tools)
    settings = {name: getattr(arguments, name) for name in ("tool_choice", "max_tokens", "temperature", "seed")}
    settings["grammar"] = not arguments.no_grammar
    chat = LoRAGenChatModel(tools=registry, grammar=False)
    chat.call_settings(**settings)  # a wrong option is named before anything is loaded
    messages = [SystemMessage(arguments.system), HumanMessage(arguments.request)]
    with shown(silent if arguments.json else None) as progress:
        chat = chat.model_copy(update=load_parts(arguments, progress))
        progress("Specialising and decoding", None)
        events = list(chat.steps(messages, **settings))
    outcome = events[-1]
    assert isinstance(outcome, StepOutcome)
    figures = outcome.metadata
    names = ("finish_reason", "prompt_tokens", "definition_tokens", "compression_ratio", "specialization")
    report: dict[str, Any] = {
        "step": describe(outcome.step),
        **{name: figures[name] for name in names},
        "generated_tokens": outcome.usage["output_tokens"],
        **{name: figures[name] for name in ("specialize_ms", "first_token_ms", "step_ms")},
        "untrained": figures.get("untrained", False),
    }
    for name in ("tool_call_probability", "tool_probabilities"):
        if name in figures:
            report[name] = figures[name]
    if arguments.json:
        print_json(report)
    else:
        _show(report)
    return 0


def describe(step: Any) -> dict[str, Any]:
    """A step as plain data: its kind, and what belongs to it."""
    from loragen_agents.conversation.react import Answer, ToolStep

    if isinstance(step, ToolStep):
        return {
            "kind": "tool",
            "thought": True,
            "action": step.action,
            "action_input": step.action_input,
            "arguments": step.arguments,
        }
    if isinstance(step, Answer):
        return {"kind": "answer", "thought": False, "answer": step.text}
    return {
        "kind": "invalid",
        "thought": None,
        "action": step.action,
        "action_input": step.action_input,
        "text": step.text,
        "error": step.error,
    }


def _show(report: dict[str, Any]) -> None:
    import json

    from loragen_agents.conversation.react import ACTION, ACTION_INPUT, ANSWER, NO_TOOL, THOUGHT_QUESTION, USE_TOOL
    from loragen_agents.support.console import say

    step = report["step"]
    if step["kind"] == "tool":
        say(f"{THOUGHT_QUESTION}{USE_TOOL}")
        say(f"{ACTION.strip()} {step['action']}", style="bold cyan")
        say(f"{ACTION_INPUT.strip()} {step['action_input']}", style="cyan")
        say(f"Arguments: {json.dumps(step['arguments'], ensure_ascii=False)}")
    elif step["kind"] == "answer":
        say(f"{THOUGHT_QUESTION}{NO_TOOL}")
        say(f"{ANSWER.strip()} {step['answer']}", style="bold green")
    else:
        say(f"The step can't be read: {step['error']}", style="bold red")
        say(step["text"])
    say(
        f"\n{report['prompt_tokens']} prompt tokens and {report['definition_tokens']} in the weights (compression "
        f"{report['compression_ratio']}); specialised in {report['specialize_ms']:.0f} ms "
        f"({report['specialization']}), first token after {report['first_token_ms']:.0f} ms, "
        f"{report['generated_tokens']} tokens in {report['step_ms']:.0f} ms",
        style="dim",
    )
    if "tool_probabilities" in report:
        likeliest = sorted(report["tool_probabilities"].items(), key=lambda one: -one[1])[:3]
        names = ", ".join(f"{name} {probability:.0%}" for name, probability in likeliest)
        say(f"some tool {report['tool_call_probability']:.0%}; likeliest: {names}", style="dim")
    if report["untrained"]:
        say(UNTRAINED, style="yellow")
