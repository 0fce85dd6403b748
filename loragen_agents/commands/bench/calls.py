"""`loragen-agents bench calls`: tool calls, or the choice of a tool alone, on any registry and requests."""

import argparse
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from loragen_agents.commands.bench.shared import add_run_arguments, engine_of, run_task

if TYPE_CHECKING:
    from loragen_agents.bench.tasks import Task
    from loragen_agents.data.records import DataSet

NAME = "calls"
HELP = "tool calls on any registry and requests (tools.jsonl, calls_*.jsonl)"

_CALL_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools",
        action="append",
        required=True,
        metavar="FILE",
        help="tools.jsonl, from which registries are drawn (also several times), or a registry (YAML, or the name of a "
        "shipped one), which is asked as it stands",
    )
    parser.add_argument(
        "--calls",
        action="append",
        required=True,
        metavar="FILE",
        help="calls_dev.jsonl, for example (also several times), or everyday: 60 requests to the assistant's tools",
    )
    parser.add_argument(
        "--registry",
        choices=("drawn", "whole", "part", "mixed"),
        default="drawn",
        help="drawn: small registries with tools that are hard to tell apart, new ones every 8 requests; whole: all "
        "tools of an application; part: --size tools of an application; mixed: --size tools of all sources "
        "(default: drawn)",
    )
    parser.add_argument("--size", type=int, default=8, metavar="N", help="tools in a registry (default: 8)")
    parser.add_argument(
        "--requests",
        "--limit",
        type=int,
        default=40,
        metavar="N",
        help="requests of each source; with --registry mixed of all together (default: 40)",
    )
    parser.add_argument(
        "--per-registry",
        type=int,
        metavar="N",
        help="requests to one registry, with --registry part or mixed (default: --size, at least 10)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="ask requests that take N calls, each made behind the observation of the one before (default: 1)",
    )
    parser.add_argument(
        "--near-duplicates",
        type=Path,
        metavar="FILE",
        help="JSON object of lists of tool ids that could answer the same request: one of each list to a registry",
    )
    parser.add_argument(
        "--choice-only", action="store_true", help="ask for the right tool alone, which takes a pass over the prompt"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the registries and requests (default: 0)")
    parser.add_argument(
        "--names",
        choices=("real", "invented", "restyled", "reworded", "swapped"),
        default="real",
        help="the tools' names: their own, or made-up words with different first tokens (default: real)",
    )
    parser.add_argument(
        "--irrelevant", type=float, default=0.0, metavar="SHARE", help="share of requests that no tool of theirs serves"
    )
    parser.add_argument("--input-format", choices=("json", "csv"), default="json", help="how inputs are written")
    add_run_arguments(parser, str(_CALL_TOKENS))


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench import everyday_calls
    from loragen_agents.bench.calls import read_data, read_near_duplicates

    files = [everyday_calls() if name == "everyday" else Path(name) for name in arguments.calls]
    if not all(name.endswith(".jsonl") for name in arguments.tools):
        task = _fixed_task(arguments, files)
        return run_task(arguments, engine_of(arguments, "calls", _CALL_TOKENS), task)
    # Files are read first, so that what is wrong in them is said before a model is loaded.
    data = read_data(map(Path, arguments.tools), files)
    groups = read_near_duplicates(arguments.near_duplicates) if arguments.near_duplicates else []
    engine = engine_of(arguments, "calls", _CALL_TOKENS)
    name_key = engine.first_token if arguments.names == "invented" else None
    return run_task(arguments, engine, _drawn_task(arguments, data, groups, name_key))


def _fixed_task(arguments: argparse.Namespace, files: list[Path]) -> "Task":
    """All requests to one registry as it stands."""
    from loragen_agents.bench.calls import registry_task
    from loragen_agents.commands.options import load_registry
    from loragen_agents.data.records import read_call_records
    from loragen_agents.errors import DataError

    if len(arguments.tools) > 1:
        raise DataError("--tools takes one registry, or any number of tools.jsonl files.")
    (name,) = arguments.tools
    calls = [record for file in files for record in read_call_records(file)]
    return registry_task(load_registry(name), calls, Path(name).stem, choice_only=arguments.choice_only)


def _drawn_task(
    arguments: argparse.Namespace,
    data: "DataSet",
    groups: list[list[str]],
    name_key: Callable[[str], Hashable] | None,
) -> "Task":
    """Requests to registries that are drawn from the tools."""
    from loragen_agents.bench.calls import application_task, calls_task
    from loragen_agents.bench.registries import Draw
    from loragen_agents.errors import DataError

    if arguments.registry != "drawn":
        draw = Draw(
            scheme=arguments.registry,
            size=arguments.size,
            requests=arguments.requests,
            per_registry=arguments.per_registry or max(10, arguments.size),
            irrelevant=arguments.irrelevant,
            steps=arguments.steps,
            names=arguments.names,
            input_format=arguments.input_format,
        )
        return application_task(
            data,
            draw,
            seed=arguments.seed,
            near_duplicates=groups,
            name_key=name_key,
            choice_only=arguments.choice_only,
        )
    if arguments.steps != 1 or groups or arguments.per_registry:
        raise DataError("--steps, --near-duplicates and --per-registry need --registry whole, part or mixed.")
    return calls_task(
        data.tools,
        data.calls,
        registry_size=arguments.size,
        requests=arguments.requests,
        seed=arguments.seed,
        names=arguments.names,
        irrelevant=arguments.irrelevant,
        input_format=arguments.input_format,
        name_key=name_key,
        choice_only=arguments.choice_only,
    )
