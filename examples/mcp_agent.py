"""An agent whose tools come from an MCP server over stdio: python examples/mcp_agent.py ["How many notes are there?"]

The server is started for each call of a tool, as MCP clients do by default. Needs `pip install 'loragen-agents[mcp]'`.
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_mcp_adapters.client import MultiServerMCPClient

from loragen_agents import LoRAGenChatModel
from loragen_agents.support.console import say

QUESTION = "How many notes are there?"
SERVER = {
    "notes": {"transport": "stdio", "command": sys.executable, "args": [str(Path(__file__).with_name("mcp_server.py"))]}
}


async def ask(question: str, model: LoRAGenChatModel, **options: Any) -> list[Any]:
    """The messages of an agent with the server's tools; `options` are those of `create_agent`."""
    tools = await MultiServerMCPClient(SERVER).get_tools()  # type: ignore[arg-type]
    agent: Any = create_agent(model, tools=tools, **options)
    return list((await agent.ainvoke({"messages": [("human", question)]}))["messages"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    for message in asyncio.run(ask(parser.parse_args().question, LoRAGenChatModel())):
        calls = "".join(f"calls {call['name']} {call['args']} " for call in getattr(message, "tool_calls", ()))
        say(f"{message.type:>6}: {calls}{message.text}")


if __name__ == "__main__":
    main()
