"""`loragen-agents bench latency`: time against the number of tools."""

import argparse
import shlex
import sys
from pathlib import Path

from loragen_agents.commands.bench.shared import (
    INTERRUPTED,
    add_model_arguments,
    engine_of,
    say_how_it_ended,
    show,
)
from loragen_agents.commands.options import output_folder

NAME = "latency"
HELP = "time to the first token and per turn for 1 to 64 tools"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools", type=Path, action="append", metavar="FILE", help="registries (YAML) to take tools from"
    )
    parser.add_argument("--counts", type=int, nargs="+", metavar="N", help="registry sizes (default: 1 2 4 ... 64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns timed for a point (default: 5)")
    parser.add_argument("--turn-tokens", type=int, default=32, metavar="N", help="length of a turn (default: 32)")
    parser.add_argument("--out", type=output_folder, metavar="FOLDER", help="folder for results, report and plots")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench import latency
    from loragen_agents.bench.report import text_table
    from loragen_agents.bench.variants import variants_from_names
    from loragen_agents.registry import ToolRegistry
    from loragen_agents.support.console import print_json
    from loragen_agents.support.content import content_folder
    from loragen_agents.support.progress import shown, silent

    engine = engine_of(arguments, "latency", max(arguments.turn_tokens, 8))
    paths = arguments.tools or sorted(content_folder("tools").glob("*.yaml"))
    counts = arguments.counts or latency.TOOL_COUNTS
    with shown(silent if arguments.json else None) as progress:
        document = latency.run_latency(
            engine,
            variants_from_names(latency.LATENCY_VARIANTS),
            latency.tool_pool([ToolRegistry.from_yaml(path) for path in paths], max(counts)),
            counts=counts,
            repeats=arguments.repeats,
            turn_tokens=arguments.turn_tokens,
            out=arguments.out,
            resume=arguments.resume,
            command=shlex.join(["loragen-agents", *sys.argv[1:]]),
            progress=progress,
        )
    if arguments.json:
        print_json(document)
    else:
        table = latency.latency_table(latency.points_of(document), arguments.turn_tokens)
        show(text_table("Latency against the number of tools", *table))
        say_how_it_ended(document, arguments.out)
    return 0 if document["complete"] else INTERRUPTED
