"""`loragen-agents chat` with a scripted model in the place of the real one: python -m tests.scripted_terminal ..."""

import sys

from loragen_agents import cli
from loragen_agents.assistant import loading
from tests.scripted_chat import call, scripted


def main() -> int:
    steps = (call("calculator", expression="15% of 240"), "It is 36.", call("slow"), "Never said.")
    loading.fetch_models = lambda choice: None
    loading.load_chat_model = lambda choice: scripted(*steps)
    return cli.main(["chat", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
