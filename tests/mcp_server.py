"""A real MCP server over stdio for tests: python -m tests.mcp_server. Its tools tell about its own environment."""

import os

from mcp.server.fastmcp import FastMCP
from mcp.types import ToolAnnotations

server = FastMCP("weather")


@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def weather(city: str) -> str:
    """Tells the weather in a city."""
    return os.environ.get("WEATHER_TEXT", f"It rains in {city}.")


@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def variables() -> str:
    """Lists the names of the server's environment variables."""
    return " ".join(sorted(os.environ))


@server.tool()
def move_house(city: str) -> str:
    """Moves to a city."""
    return f"Moved to {city}."


if __name__ == "__main__":
    server.run()
