"""`loragen-agents models list|pull|path`: the language models that are known and those on this machine."""

import argparse
from typing import Any

NAME = "models"
HELP = "list language models, fetch one, or say where one is"

_MODEL_HELP = "known name, Hub id (owner/model[@revision]), folder or GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="known models and converted ones in the cache")
    pull = actions.add_parser("pull", help="fetch, check and convert a model, so that later runs need no network")
    path = actions.add_parser("path", help="print the folder of a model that is on this machine")
    for action in (pull, path):
        action.add_argument("model", nargs="?", default=None, help=f"{_MODEL_HELP}; the default model if left out")


def run(arguments: argparse.Namespace) -> int:
    return {"list": _list, "pull": _pull, "path": _path}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from loragen_agents.models.cache import cache_folder, stored_conversions
    from loragen_agents.models.sources import DEFAULT_MODEL, KNOWN_MODELS
    from loragen_agents.support.console import print_json, say

    stored = {(manifest.name, manifest.sha256): folder for folder, manifest in stored_conversions()}
    models: list[dict[str, Any]] = []
    for known in KNOWN_MODELS.values():
        folder = stored.pop((known.name, known.sha256), None)
        models.append(
            {
                "name": known.name,
                "default": known.name == DEFAULT_MODEL,
                "description": known.description,
                "license": known.license,
                "download_bytes": known.size,
                "folder": str(folder) if folder else None,
            }
        )
    models += [
        {
            "name": name,
            "default": False,
            "description": "converted from a GGUF file",
            "license": None,
            "download_bytes": None,
            "folder": str(folder),
        }
        for (name, _), folder in stored.items()
    ]
    if arguments.json:
        print_json({"cache": str(cache_folder()), "models": models})
        return 0
    for model in models:
        say(model["name"] + (" (default)" if model["default"] else ""), style="bold")
        say(f"  {model['description']}; licence: {model['license'] or 'see its source'}")
        say("  " + (model["folder"] or f"not on this machine ({model['download_bytes'] // 1_000_000} MB to fetch)"))
    say("A Hub id (owner/model), a folder or a GGUF file can be given in place of a name.")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from loragen_agents.models.cache import obtain_model
    from loragen_agents.models.sources import DEFAULT_MODEL
    from loragen_agents.support.console import print_json, say
    from loragen_agents.support.progress import shown, silent

    with shown(silent if arguments.json else None) as progress:
        model = obtain_model(arguments.model or DEFAULT_MODEL, progress=progress)
    if arguments.json:
        print_json({"name": model.name, "folder": str(model.folder), "fingerprint": model.fingerprint})
    else:
        say(f"{model.name} is in {model.folder}")
    return 0


def _path(arguments: argparse.Namespace) -> int:
    from loragen_agents.errors import ModelLoadError
    from loragen_agents.models.cache import find_stored
    from loragen_agents.models.sources import DEFAULT_MODEL
    from loragen_agents.support.console import print_json, say

    name = arguments.model or DEFAULT_MODEL
    folder = find_stored(name)
    if folder is None:
        raise ModelLoadError(f"{name} is not on this machine; fetch it with `loragen-agents models pull {name}`")
    if arguments.json:
        print_json({"name": name, "folder": str(folder)})
    else:
        say(str(folder))
    return 0
