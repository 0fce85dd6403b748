"""Makes the picture at the top of the README from a real run.

    python -m loragen_agents.assistant.record docs/assistant.svg

The requests below are put to the model that ships, in a folder of example files; the picture shows what it says.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console

from loragen_agents.assistant.agent import Assistant
from loragen_agents.assistant.loading import ModelChoice, load_chat_model, warm_up
from loragen_agents.assistant.permission import Permissions
from loragen_agents.assistant.screen import Screen
from loragen_agents.assistant.tools.catalog import chosen_tools
from loragen_agents.assistant.tools.context import Context, Folder
from loragen_agents.assistant.tools.store import Store

REQUESTS = (
    "What is 15% of 240?",
    "List the files",
    "What day of the week is 3 May 2027?",
    "Take a note: the boiler man comes on Friday",
)
FILES = {
    "trip.md": "# Oslo\n\n- **Friday**: train at 7:05\n- **Saturday**: fjord, bring a coat\n",
    "shopping.txt": "milk\nbread\n",
    "expenses.csv": "item,amount\nrent,1200\nfood,350.50\ntrain,89\n",
}
WIDTH = 80


async def record(console: Console, requests: Sequence[str]) -> None:
    """Run the requests, each as a conversation of its own, and show them on `console`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "files"
        root.mkdir()
        for name, text in FILES.items():
            (root / name).write_text(text, encoding="utf-8")
        context = Context(Folder(root), Store(Path(folder) / "store.sqlite"), lambda: datetime.now().astimezone())
        tools = chosen_tools(context)
        model = load_chat_model(ModelChoice())
        warm_up(model, tools, "")
        screen = Screen(console)
        console.print("$ loragen-agents chat", style="bold")
        screen.line(f"{len(tools)} tools, files in ~/files", "dim")
        for request in requests:
            console.print(f"> {request}", style="bold")
            assistant = Assistant(model, tools, context, Permissions())
            screen.turn_ends(await assistant.turn(request, screen.show))
            console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the SVG file to write")
    parser.add_argument("request", nargs="*", help="requests in place of the usual ones")
    arguments = parser.parse_args()
    console = Console(
        record=True,
        width=WIDTH,
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        markup=False,
        emoji=False,
    )
    asyncio.run(record(console, arguments.request or REQUESTS))
    console.save_svg(str(arguments.out), title="loragen-agents chat")


if __name__ == "__main__":
    main()
