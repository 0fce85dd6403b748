"""`loragen-agents bench compare`: two results side by side."""

import argparse
from pathlib import Path

from loragen_agents.commands.bench.shared import show

NAME = "compare"
HELP = "two results side by side, sample by sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run (its --out)")
    parser.add_argument("b", type=Path, metavar="B", help="folder of another run, or of the same one")
    parser.add_argument("--variant-a", metavar="NAME", help="one variant of A (default: all that both have)")
    parser.add_argument("--variant-b", metavar="NAME", help="the variant of B beside it")


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from loragen_agents.bench.compare import compare, comparison_table
    from loragen_agents.bench.report import text_table
    from loragen_agents.bench.results import read_results
    from loragen_agents.support.console import print_json, say

    comparisons = compare(arguments.a, arguments.b, variant_a=arguments.variant_a, variant_b=arguments.variant_b)
    if arguments.json:
        print_json([asdict(comparison) for comparison in comparisons])
        return 0
    say(f"A {arguments.a}, B {arguments.b}; rates in percent, differences in points, paired bootstrap")
    show(text_table("", *comparison_table(comparisons, read_results(arguments.a)["task"]["metrics"])))
    return 0
