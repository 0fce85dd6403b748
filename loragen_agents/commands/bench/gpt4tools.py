"""`loragen-agents bench gpt4tools`: the paper's Table 3 on this machine."""

import argparse
from pathlib import Path

from loragen_agents.commands.bench.shared import add_run_arguments, engine_of, run_task

NAME = "gpt4tools"
HELP = "the paper's Table 3: GPT4Tools' five rates for every variant"

# Longest text of a step. Gold steps of GPT4Tools-mini have at most 41 tokens of the embedded model.
_MINI_TOKENS, _FILE_TOKENS = 48, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        metavar="FILE",
        help="a GPT4Tools file of your own (several times for several); without it GPT4Tools-mini, which is shipped",
    )
    parser.add_argument(
        "--part", choices=("unseen", "seen", "both"), default="unseen", help="part of GPT4Tools-mini (default: unseen)"
    )
    parser.add_argument(
        "--registry",
        choices=("own", "all"),
        default="own",
        help="tools that are offered: the sample's own, or all tools of the data (default: own)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="score N samples of each part or file only")
    add_run_arguments(parser, f"{_MINI_TOKENS}, with --data {_FILE_TOKENS}")


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench.gpt4tools_task import file_task, mini_task
    from loragen_agents.data.gpt4tools_mini import MiniPart

    if arguments.data:
        task = file_task(arguments.data, tools=arguments.registry, limit=arguments.limit)
    else:
        parts: tuple[MiniPart, ...] = ("seen", "unseen") if arguments.part == "both" else (arguments.part,)
        task = mini_task(parts, tools=arguments.registry, limit=arguments.limit)
    longest = _FILE_TOKENS if arguments.data else _MINI_TOKENS
    return run_task(arguments, engine_of(arguments, "gpt4tools", longest), task)
