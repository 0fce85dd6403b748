"""`loragen-agents data build|check|sample`: training data in the intermediate format, from its originals."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loragen_agents.data.records import DataSet

from loragen_agents.commands.options import output_folder

NAME = "data"
HELP = "build, check and look at training data"

SOURCES = ("computer", "described", "seal-tools", "metatool", "sgd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    build = actions.add_parser("build", help="build tools.jsonl and calls_*.jsonl from a source")
    build.add_argument(
        "--source",
        choices=SOURCES,
        required=True,
        help="computer: the project's own tools; described: requests made from descriptions",
    )
    build.add_argument(
        "--input", type=Path, metavar="FOLDER", help="checkout of the source; for described, a data folder"
    )
    build.add_argument("--out", type=output_folder, required=True, metavar="FOLDER", help="folder to write")
    build.add_argument(
        "--copies", type=int, metavar="N", help="computer: requests a template (4); described: requests a tool (3)"
    )
    build.add_argument("--seed", type=int, default=0, help="computer, described: of the values (default: 0)")

    check = actions.add_parser("check", help="read data folders and count what is in them")
    check.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")

    sample = actions.add_parser("sample", help="show registries and requests as a training run draws them")
    sample.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    sample.add_argument("--split", choices=("train", "dev"), default="train")
    sample.add_argument("--count", type=int, default=1, metavar="N", help="how many registries (default: 1)")
    sample.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    return {"build": _build, "check": _check, "sample": _sample}[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> int:
    from loragen_agents.data.described import build_described
    from loragen_agents.data.readers import READERS
    from loragen_agents.data.records import load_data, write_data
    from loragen_agents.data.templates import build_computer_tools
    from loragen_agents.errors import DataError
    from loragen_agents.support.console import say

    if arguments.source == "computer":
        data = build_computer_tools(copies=arguments.copies or 4, seed=arguments.seed)
    elif arguments.input is None:
        raise DataError(f"--source {arguments.source} needs --input FOLDER, what it is made from; see --help")
    elif arguments.source == "described":
        data = build_described(load_data(arguments.input), copies=arguments.copies or 3, seed=arguments.seed)
    else:
        data = READERS[arguments.source](arguments.input)
    write_data(data, arguments.out)
    if not arguments.json:
        say(f"Wrote {arguments.out}")
    return _report(data, arguments)


def _check(arguments: argparse.Namespace) -> int:
    from loragen_agents.data.records import load_data

    return _report(load_data(*arguments.folders), arguments)


def _report(data: "DataSet", arguments: argparse.Namespace) -> int:
    from collections import Counter

    from loragen_agents.support.console import print_json, say

    tools = Counter((tool.source, tool.split) for tool in data.tools.values())
    calls = Counter((record.source, record.split) for record in data.calls)
    rows = [
        {"source": source, "split": split, "tools": tools[source, split], "requests": calls[source, split]}
        for source, split in sorted(tools.keys() | calls.keys())
    ]
    if arguments.json:
        print_json(rows)
    else:
        for row in rows:
            say(f"{row['source']:<12} {row['split']:<6} {row['tools']:>6} tools {row['requests']:>7} requests")
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from loragen_agents.data.episodes import plain_episode
    from loragen_agents.data.records import load_data
    from loragen_agents.data.sampler import RegistrySampler
    from loragen_agents.support.console import print_json, say

    sampler = RegistrySampler(load_data(*arguments.folders), seed=arguments.seed, split=arguments.split)
    episodes = [plain_episode(sampler.episode(index)) for index in range(arguments.count)]
    if arguments.json:
        print_json(episodes)
        return 0
    for episode in episodes:
        say(f"Registry of {len(episode['tools'])} tools, inputs as {episode['input_format']}", style="bold")
        for tool in episode["tools"]:
            say(f"> {tool['name']}: {tool['description']}")
        for sample in episode["samples"]:
            say()
            say(f"{sample['kind']} ({sample['source']}): {sample['requests'][-1]}", style="cyan")
            for step in sample["steps"]:
                say(f"  taken: {step['action']}({step['action_input']}) -> {step['observation']}")
            say(f"  {sample['target']}")
        say()
    return 0
