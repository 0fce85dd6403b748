"""`loragen-agents train`: run a training recipe."""

import argparse
import sys
from pathlib import Path

from loragen_agents.commands.options import output_folder

NAME = "train"
HELP = "train a generator, or a baseline, as a recipe says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe file, or the name of one of the package's own (training/*.yaml)")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="data folders, in place of the recipe's")
    parser.add_argument("--out", type=output_folder, metavar="FOLDER", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--steps", type=int, help="in place of the recipe's number of steps")
    parser.add_argument("--start-from", metavar="GENERATOR", help="a generator whose weights to begin with")


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.support.console import print_json, say
    from loragen_agents.support.progress import lines, shown, silent
    from loragen_agents.training.argument_recipe import ArgumentRecipe
    from loragen_agents.training.argument_trainer import train_argument_head
    from loragen_agents.training.head_recipe import HeadRecipe
    from loragen_agents.training.head_trainer import train_head
    from loragen_agents.training.recipe import load_recipe, recipe_file
    from loragen_agents.training.trainer import train

    changes = {"steps": arguments.steps, "start_from": arguments.start_from}
    if arguments.data:
        changes["data"] = tuple(arguments.data)
    recipe = load_recipe(arguments.recipe)
    given = {name: value for name, value in changes.items() if value is not None}
    recipe = type(recipe).model_validate(recipe.model_dump() | given)
    folder = Path(arguments.out or Path("runs") / recipe_file(arguments.recipe).stem)
    # A run of hours is often started where no terminal is; its log then says how it goes.
    quiet = silent if arguments.json else None if sys.stderr.isatty() else lines()
    with shown(quiet) as progress:
        if isinstance(recipe, HeadRecipe):
            # What an interrupted run has read is found in its folder; the rest takes a minute or two.
            weights = train_head(recipe, folder, progress=progress)
        elif isinstance(recipe, ArgumentRecipe):
            weights = train_argument_head(recipe, folder, progress=progress)
        else:
            weights = train(recipe, folder, resume=arguments.resume, progress=progress)
    if arguments.json:
        print_json({"weights": str(weights), "run": str(folder)})
    else:
        say(f"The best generator of this run is in {weights}")
    return 0
