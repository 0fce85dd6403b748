"""`loragen-agents bench bfcl`: the Berkeley Function Calling Leaderboard's single-turn Python categories."""

import argparse
import shlex
import sys

from loragen_agents.commands.bench.shared import INTERRUPTED, say_how_it_ended, show
from loragen_agents.commands.options import load_parts, output_folder

NAME = "bfcl"
HELP = "BFCL's single-turn Python categories through the chat model, scored by BFCL's own checker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--categories",
        metavar="NAME,NAME",
        help="simple, multiple, irrelevance, parallel, parallel_multiple, live_simple, ... (default: all of them)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="N rows of each category, spread evenly (default: all)")
    parser.add_argument(
        "--out", type=output_folder, metavar="FOLDER", help="folder for results, report and files as BFCL's own"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest step (default: 256)")
    parser.add_argument("--edge", metavar="MODEL", help="edge model (default: the embedded one)")
    parser.add_argument("--cloud", metavar="MODEL", help="cloud model (default: the edge model)")
    parser.add_argument("--generator", default="default", metavar="FOLDER", help="generator checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench import report
    from loragen_agents.bench.bfcl import run_bfcl
    from loragen_agents.bench.bfcl_package import CATEGORIES, load_checker, obtain, read_entries
    from loragen_agents.chat.chat_models import LoRAGenChatModel
    from loragen_agents.errors import DataError
    from loragen_agents.support.console import print_json
    from loragen_agents.support.progress import shown, silent

    if arguments.limit is not None and arguments.limit < 1:
        raise DataError(f"A limit of {arguments.limit} rows leaves nothing to score; give 1 or more.")
    names = [name.strip() for name in arguments.categories.split(",")] if arguments.categories else list(CATEGORIES)
    names = ["simple_python" if name == "simple" else name for name in names]
    if unknown := [name for name in names if name not in CATEGORIES]:
        raise DataError(f"There is no category {unknown[0]!r}; expected some of {', '.join(CATEGORIES)}.")
    with shown(silent if arguments.json else None) as progress:
        folder = obtain(progress)
    entries = {name: read_entries(folder, name, arguments.limit) for name in names}
    parts = load_parts(arguments, None, service=False)
    edge, cloud, generator = parts["model"], parts["cloud"], parts["generator"]
    # Every row has tools of its own: kept, they would only push a user's own out of the cache.
    model = LoRAGenChatModel(**parts, max_tokens=arguments.max_tokens, specialization_cache=False)
    settings = {
        "models": {
            "edge": {"name": edge.name, "fingerprint": edge.fingerprint},
            "cloud": {"name": cloud.name, "fingerprint": cloud.fingerprint},
        },
        "generator": generator.fingerprint,
        "dtype": str(edge.dtype).removeprefix("torch."),
        "max_tokens": arguments.max_tokens,
    }
    document = run_bfcl(
        entries,
        model,
        load_checker(folder),
        settings,
        out=arguments.out,
        resume=arguments.resume,
        command=shlex.join(["loragen-agents", *sys.argv[1:]]),
    )
    if arguments.json:
        print_json(document)
    else:
        show(report.render(document))
        say_how_it_ended(document, arguments.out)
    return 0 if document["complete"] else INTERRUPTED
