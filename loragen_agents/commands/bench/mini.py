"""`loragen-agents bench mini`: GPT4Tools-mini as files."""

import argparse

from loragen_agents.commands.options import output_folder

NAME = "mini"
HELP = "write GPT4Tools-mini as files in GPT4Tools' format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=output_folder, required=True, metavar="FOLDER")


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.data.gpt4tools_mini import MINI_PARTS
    from loragen_agents.data.gpt4tools_mini_rows import write_mini
    from loragen_agents.support.console import print_json, say

    written = {part: write_mini(part, arguments.out) for part in MINI_PARTS}
    if arguments.json:
        print_json({part: {"file": str(path), "samples": count} for part, (path, count) in written.items()})
        return 0
    for path, count in written.values():
        say(f"{path}: {count} samples")
    return 0
