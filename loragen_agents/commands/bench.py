"""`loragen-agents bench gpt4tools|calls|latency|compare|mini`: how well and how fast, for every row of the table."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loragen_agents.bench.engine import ModelEngine
    from loragen_agents.bench.tasks import Task

NAME = "bench"
HELP = "measure how well and how fast specialised models use tools, beside what one would use instead"

_INTERRUPTED = 130

# Longest text of a step. Gold steps of GPT4Tools-mini have at most 41 tokens of the embedded model.
_MINI_TOKENS, _FILE_TOKENS, _CALL_TOKENS = 48, 64, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    gpt4tools = actions.add_parser("gpt4tools", help="the paper's Table 3: GPT4Tools' five rates for every row")
    gpt4tools.add_argument(
        "--data",
        type=Path,
        action="append",
        metavar="FILE",
        help="a GPT4Tools file of your own (several times for several); without it GPT4Tools-mini, which is shipped",
    )
    gpt4tools.add_argument(
        "--part", choices=("unseen", "seen", "both"), default="unseen", help="part of GPT4Tools-mini (default: unseen)"
    )
    gpt4tools.add_argument(
        "--registry",
        choices=("own", "all"),
        default="own",
        help="tools that are offered: the sample's own, or all tools of the data (default: own)",
    )
    gpt4tools.add_argument("--limit", type=int, metavar="N", help="score N samples of each part or file only")
    _add_run_arguments(gpt4tools, f"{_MINI_TOKENS}, with --data {_FILE_TOKENS}")

    calls = actions.add_parser("calls", help="tool calls on any registry and requests (tools.jsonl, calls_*.jsonl)")
    calls.add_argument(
        "--tools",
        action="append",
        required=True,
        metavar="FILE",
        help="tools.jsonl, from which registries are drawn (also several times), or a registry (YAML, or the name of a "
        "shipped one), which is asked as it stands",
    )
    calls.add_argument(
        "--calls",
        action="append",
        required=True,
        metavar="FILE",
        help="calls_dev.jsonl, for example (also several times), or everyday: 60 requests to the assistant's tools",
    )
    calls.add_argument(
        "--registry",
        choices=("drawn", "whole", "part", "mixed"),
        default="drawn",
        help="drawn: small registries with tools that are hard to tell apart, new ones every 8 requests; whole: all "
        "tools of an application; part: --size tools of an application; mixed: --size tools of all sources "
        "(default: drawn)",
    )
    calls.add_argument("--size", type=int, default=8, metavar="N", help="tools in a registry (default: 8)")
    calls.add_argument(
        "--requests",
        "--limit",
        type=int,
        default=40,
        metavar="N",
        help="requests of each source; with --registry mixed of all together (default: 40)",
    )
    calls.add_argument(
        "--per-registry",
        type=int,
        metavar="N",
        help="requests to one registry, with --registry part or mixed (default: --size, at least 10)",
    )
    calls.add_argument(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="ask requests that take N calls, each made behind the observation of the one before (default: 1)",
    )
    calls.add_argument(
        "--near-duplicates",
        type=Path,
        metavar="FILE",
        help="JSON object of lists of tool ids that could answer the same request: one of each list to a registry",
    )
    calls.add_argument(
        "--choice-only", action="store_true", help="ask for the right tool alone, which takes a pass over the prompt"
    )
    calls.add_argument("--seed", type=int, default=0, help="of the registries and requests (default: 0)")
    calls.add_argument(
        "--names",
        choices=("real", "invented", "restyled", "reworded", "swapped"),
        default="real",
        help="the tools' names: their own, or made-up words with different first tokens (default: real)",
    )
    calls.add_argument(
        "--irrelevant", type=float, default=0.0, metavar="SHARE", help="share of requests that no tool of theirs serves"
    )
    calls.add_argument("--input-format", choices=("json", "csv"), default="json", help="how inputs are written")
    _add_run_arguments(calls, str(_CALL_TOKENS))

    latency = actions.add_parser("latency", help="time to the first token and per turn for 1 to 64 tools")
    latency.add_argument(
        "--tools", type=Path, action="append", metavar="FILE", help="registries (YAML) to take tools from"
    )
    latency.add_argument("--counts", type=int, nargs="+", metavar="N", help="registry sizes (default: 1 2 4 ... 64)")
    latency.add_argument("--repeats", type=int, default=5, metavar="N", help="turns timed for a point (default: 5)")
    latency.add_argument("--turn-tokens", type=int, default=32, metavar="N", help="length of a turn (default: 32)")
    latency.add_argument("--out", type=Path, metavar="FOLDER", help="folder for results, report and plots")
    latency.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    _add_model_arguments(latency)

    compare = actions.add_parser("compare", help="two results side by side, sample by sample")
    compare.add_argument("a", type=Path, metavar="A", help="folder of a run (its --out)")
    compare.add_argument("b", type=Path, metavar="B", help="folder of another run, or of the same one")
    compare.add_argument("--row-a", metavar="ROW", help="one row of A (default: all rows that both have)")
    compare.add_argument("--row-b", metavar="ROW", help="the row of B beside it")

    mini = actions.add_parser("mini", help="write GPT4Tools-mini as files in GPT4Tools' format")
    mini.add_argument("--out", type=Path, required=True, metavar="FOLDER")


def _add_run_arguments(parser: argparse.ArgumentParser, default_max_tokens: str) -> None:
    parser.add_argument("--rows", metavar="ROW,ROW", help="rows of the table by name (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for results, predictions, report and plots")
    parser.add_argument("--resume", action="store_true", help="go on with the run that --out holds")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"longest text of a step (default: {default_max_tokens})"
    )
    _add_model_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--edge", metavar="MODEL", help="edge model (default: the embedded one)")
    parser.add_argument("--cloud", metavar="MODEL", help="cloud model (default: the edge model)")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="ROW=FOLDER",
        help="weights of a row: a PEFT folder for lora and lora-definitions, a generator for lora-gen rows",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(arguments: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "gpt4tools": _gpt4tools,
        "calls": _calls,
        "latency": _latency,
        "compare": _compare,
        "mini": _mini,
    }
    return actions[arguments.action](arguments)


def _gpt4tools(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench.gpt4tools_task import file_task, mini_task
    from loragen_agents.data.gpt4tools_mini import Part

    if arguments.data:
        task = file_task(arguments.data, tools=arguments.registry, limit=arguments.limit)
    else:
        parts: tuple[Part, ...] = ("seen", "unseen") if arguments.part == "both" else (arguments.part,)
        task = mini_task(parts, tools=arguments.registry, limit=arguments.limit)
    longest = _FILE_TOKENS if arguments.data else _MINI_TOKENS
    return _run(arguments, _engine(arguments, "gpt4tools", longest), task)


def _calls(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench import everyday_calls
    from loragen_agents.bench.calls import application_task, calls_task, read_data, read_near_duplicates, registry_task
    from loragen_agents.bench.registries import Draw
    from loragen_agents.commands.options import read_tools
    from loragen_agents.data.records import read_calls
    from loragen_agents.errors import DataError

    files = [everyday_calls() if name == "everyday" else Path(name) for name in arguments.calls]
    if not all(name.endswith(".jsonl") for name in arguments.tools):
        if len(arguments.tools) > 1:
            raise DataError("--tools takes one registry, or any number of tools.jsonl files.")
        (name,) = arguments.tools
        calls = [record for file in files for record in read_calls(file)]
        fixed = registry_task(read_tools(name), calls, Path(name).stem, choice_only=arguments.choice_only)
        return _run(arguments, _engine(arguments, "calls", _CALL_TOKENS), fixed)
    data = read_data(map(Path, arguments.tools), files)
    groups = read_near_duplicates(arguments.near_duplicates) if arguments.near_duplicates else []
    engine = _engine(arguments, "calls", _CALL_TOKENS)
    name_key = engine.first_token if arguments.names == "invented" else None
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
        task = application_task(
            data,
            draw,
            seed=arguments.seed,
            near_duplicates=groups,
            name_key=name_key,
            choice_only=arguments.choice_only,
        )
        return _run(arguments, engine, task)
    if arguments.steps != 1 or groups or arguments.per_registry:
        raise DataError("--steps, --near-duplicates and --per-registry need --registry whole, part or mixed.")
    task = calls_task(
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
    return _run(arguments, engine, task)


def _run(arguments: argparse.Namespace, engine: "ModelEngine", task: "Task") -> int:
    from loragen_agents.bench import report
    from loragen_agents.bench.launch import launch
    from loragen_agents.bench.rows import CHOICE_ROWS, DEFAULT_ROWS, rows_from_names
    from loragen_agents.support.console import print_json

    default = CHOICE_ROWS if task.choice_only else DEFAULT_ROWS
    rows = rows_from_names(arguments.rows.split(",") if arguments.rows else default)
    document = launch(
        task,
        rows,
        engine,
        out=arguments.out,
        resume=arguments.resume,
        command=shlex.join(["loragen-agents", *sys.argv[1:]]),
    )
    if arguments.json:
        print_json(document)
    else:
        _show(report.render(document))
        _say_how_it_ended(document, arguments.out)
    return 0 if document["complete"] else _INTERRUPTED


def _say_how_it_ended(document: dict[str, Any], out: Path | None) -> None:
    from loragen_agents.bench import plots
    from loragen_agents.support.console import say

    if not document["complete"]:
        where = f" `--out {out} --resume` goes on." if out else ""
        say(f"Stopped early; the figures are over what was run.{where}")
    elif out:
        say(f"Results and report are in {out}.")
        if hint := plots.hint():
            say(hint)


def _latency(arguments: argparse.Namespace) -> int:
    from loragen_agents.bench import latency
    from loragen_agents.bench.report import text_table
    from loragen_agents.bench.rows import rows_from_names
    from loragen_agents.registry import ToolRegistry
    from loragen_agents.support.console import print_json
    from loragen_agents.support.content import content_folder
    from loragen_agents.support.progress import shown, silent

    engine = _engine(arguments, "latency", max(arguments.turn_tokens, 8))
    paths = arguments.tools or sorted(content_folder("tools").glob("*.yaml"))
    counts = arguments.counts or latency.TOOL_COUNTS
    with shown(silent if arguments.json else None) as progress:
        document = latency.launch(
            engine,
            rows_from_names(latency.LATENCY_ROWS),
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
        _show(text_table("Latency against the number of tools", *table))
        _say_how_it_ended(document, arguments.out)
    return 0 if document["complete"] else _INTERRUPTED


def _compare(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from loragen_agents.bench.compare import compare, comparison_table
    from loragen_agents.bench.report import text_table
    from loragen_agents.bench.results import read_results
    from loragen_agents.support.console import print_json, say

    comparisons = compare(arguments.a, arguments.b, row_a=arguments.row_a, row_b=arguments.row_b)
    if arguments.json:
        print_json([asdict(comparison) for comparison in comparisons])
        return 0
    say(f"A {arguments.a}, B {arguments.b}; rates in percent, differences in points, paired bootstrap")
    _show(text_table("", *comparison_table(comparisons, read_results(arguments.a)["task"]["metrics"])))
    return 0


def _mini(arguments: argparse.Namespace) -> int:
    from loragen_agents.data.gpt4tools_mini import PARTS
    from loragen_agents.data.gpt4tools_mini_rows import write_mini
    from loragen_agents.support.console import print_json, say

    written = {part: write_mini(part, arguments.out) for part in PARTS}
    if arguments.json:
        print_json({part: {"file": str(path), "samples": count} for part, (path, count) in written.items()})
        return 0
    for path, count in written.values():
        say(f"{path}: {count} samples")
    return 0


def _show(tables: Any) -> None:
    from loragen_agents.support.console import results

    if not results.is_terminal:  # into a pipe or a file the tables go as wide as they are
        results.width = 250
    results.print(tables)


def _engine(arguments: argparse.Namespace, task: str, max_tokens: int) -> "ModelEngine":
    import torch

    from loragen_agents.bench.engine import ModelEngine
    from loragen_agents.models.language_models import DEFAULT_MODEL

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return ModelEngine(
        task,
        edge=arguments.edge or DEFAULT_MODEL,
        cloud=arguments.cloud,
        weights=arguments.weights,
        device=arguments.device,
        dtype=arguments.dtype,
        max_tokens=getattr(arguments, "max_tokens", None) or max_tokens,
    )
