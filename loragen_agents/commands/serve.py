"""`loragen-agents serve`: the specialised model behind OpenAI's HTTP interface."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loragen_agents.commands.options import add_device_options

if TYPE_CHECKING:
    from loragen_agents.chat.chat_models import LoRAGenChatModel

NAME = "serve"
HELP = "answer OpenAI-compatible clients; tools of their requests are specialised on the fly"
KEY_VARIABLE = "LORAGEN_AGENTS_API_KEY"
# The least that each of these options can be.
_LEAST = {"max_tokens": 1, "max_registries": 1, "max_memory": 1, "workers": 1, "max_waiting": 0, "grace": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="port to serve on (8080); 0 takes a free one")
    parser.add_argument("--model", metavar="MODEL", help="the small LM (name, Hub id, folder, GGUF file)")
    parser.add_argument("--cloud", metavar="MODEL", help="the LM that reads the definitions; the small LM if left out")
    parser.add_argument("--generator", default="default", metavar="FOLDER", help="generator checkpoint")
    add_device_options(parser)
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients have to show; better given as {KEY_VARIABLE}, which no list shows",
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens of an answer (256)")
    parser.add_argument("--max-registries", type=int, default=16, metavar="N", help="specialised models kept (16)")
    parser.add_argument(
        "--max-memory", type=int, default=2048, metavar="MIB", help="memory for the specialised models, in MiB (2048)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="requests decoded at a time (1)")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests that may wait (64)")
    parser.add_argument("--grace", type=int, default=30, metavar="SECONDS", help="time to end at a stop (30)")


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.errors import ServerError
    from loragen_agents.support.console import print_json, say

    try:
        from loragen_agents.server.launch import address, check_exposure, open_socket, run_server
        from loragen_agents.server.service import Service
        from loragen_agents.server.work_queue import WorkQueue
    except ModuleNotFoundError as error:
        raise ServerError(f"{error.name} is missing; install it with: pip install 'loragen-agents[serve]'") from error

    for name, least in _LEAST.items():
        if getattr(arguments, name) < least:
            raise ServerError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected at least {least}")
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    check_exposure(arguments.host, key)
    from loragen_agents.models.language_models import DEFAULT_MODEL

    given = arguments.model or DEFAULT_MODEL
    # Clients are told a folder's name, not where on this machine it is.
    name = Path(given).name if Path(given).exists() else given
    listening = open_socket(arguments.host, arguments.port)

    def load() -> "LoRAGenChatModel":
        model = _load(arguments, given)
        if not arguments.json:
            say("Ready")
        return model

    queue = WorkQueue(arguments.workers, arguments.max_waiting)
    service = Service(name, load, queue=queue, api_key=key)
    if arguments.json:
        print_json({"url": address(listening), "model": name})
        sys.stdout.flush()
    else:
        say(f"Serving {name} at {address(listening)} as soon as it is loaded (Ctrl-C stops)")
    run_server(service, listening, arguments.host, grace_seconds=arguments.grace)
    return 0


def _load(arguments: argparse.Namespace, name: str) -> "LoRAGenChatModel":
    from loragen_agents.chat.chat_models import LoRAGenChatModel
    from loragen_agents.chat.loading import load_parts
    from loragen_agents.specialization.specialize import bound_specializations

    bound_specializations(arguments.max_registries, arguments.max_memory * 2**20)
    parts = load_parts(
        name, arguments.cloud, arguments.generator, device=arguments.device, dtype=arguments.dtype, service=False
    )
    return LoRAGenChatModel(**parts, max_tokens=arguments.max_tokens)
