"""An MCP server with two tools over stdio, for mcp_agent.py and servers.json: it keeps notes as long as it runs."""

from mcp.server.fastmcp import FastMCP
from mcp.types import ToolAnnotations

# What it logs goes to the terminal of whoever started it.
server = FastMCP("notes", log_level="WARNING")
_notes: list[str] = []


@server.tool()
def add_note(text: str) -> str:
    """Write down a note."""
    _notes.append(text)
    return f"Noted: {text}"


@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def count_notes() -> str:
    """Tell how many notes there are."""
    return f"There are {len(_notes)} notes."


if __name__ == "__main__":
    server.run(transport="stdio")
