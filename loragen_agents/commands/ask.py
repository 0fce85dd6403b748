"""`loragen-agents ask`: one step of the specialised model for a request, with what it took."""

import argparse
import time
from typing import Any

from loragen_agents.commands.options import UNTRAINED, add_specialization_options, load_parts, read_tools

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
    from loragen_agents.chat.settings import read_settings
    from loragen_agents.conversation.prompts import Turn
    from loragen_agents.conversation.react import parse_step
    from loragen_agents.specialization.specialize import specialize
    from loragen_agents.support.console import print_json
    from loragen_agents.support.progress import shown, silent

    registry = read_tools(arguments.tools)
    given = {name: getattr(arguments, name) for name in ("tool_choice", "max_tokens", "temperature", "seed")}
    fields = {"model": arguments.edge, "tools": registry, "grammar": not arguments.no_grammar, "top_p": 1.0, "top_k": 0}
    settings = read_settings({**fields, **given}, {}, None, registry.input_format)
    with shown(silent if arguments.json else None) as progress:
        edge, cloud, generator = load_parts(arguments, progress)
        progress("Specialising", None)
        made = specialize(registry, arguments.system, edge=edge, cloud=cloud, generator=generator)
        progress("Decoding", None)
        started = time.perf_counter()
        decoding = made.model.stream(
            [Turn(arguments.request)],
            settings.sampling,
            grammar=settings.grammar,
            tool_choice=settings.tool_choice,
        )
        for _ in decoding:
            pass
        completion = decoding.completion
        seconds = time.perf_counter() - started
    step = parse_step(completion.text, registry, cut_off=completion.finish_reason != "stop")
    prompt = completion.prompt_tokens
    report: dict[str, Any] = {
        "step": describe(step),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": prompt,
        "definition_tokens": made.definition_tokens,
        "compression_ratio": round((prompt + made.definition_tokens) / prompt, 2),
        "generated_tokens": len(completion.token_ids),
        "specialization": made.source,
        "specialize_ms": round(made.seconds * 1000, 1),
        "first_token_ms": round(completion.first_token_seconds * 1000, 1),
        "step_ms": round(seconds * 1000, 1),
        "untrained": made.weights_are_zero,
    }
    if decoding.tools is not None:
        report["tool_call_probability"] = decoding.tools.calls_tool
        report["tool_probabilities"] = decoding.tools.tools
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

    from loragen_agents.conversation.prompts import THOUGHT_QUESTION
    from loragen_agents.support.console import say

    step = report["step"]
    if step["kind"] == "tool":
        say(f"{THOUGHT_QUESTION} Yes")
        say(f"Action: {step['action']}", style="bold cyan")
        say(f"Action Input: {step['action_input']}", style="cyan")
        say(f"Arguments: {json.dumps(step['arguments'], ensure_ascii=False)}")
    elif step["kind"] == "answer":
        say(f"{THOUGHT_QUESTION} No")
        say(f"AI: {step['answer']}", style="bold green")
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
