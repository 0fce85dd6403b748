"""An MCP server with two tools over stdio, for mcp_agent.py: it keeps notes as long as it runs."""

from mcp.server.fastmcp import FastMCP

server = FastMCP("notes")
_notes: list[str] = []


@server.tool()
def add_note(text: str) -> str:
    """Write down a note."""
    _notes.append(text)
    return f"Noted: {text}"


@server.tool()
def count_notes() -> str:
    """Tell how many notes there are."""
    return f"There are {len(_notes)} notes."


if __name__ == "__main__":
    server.run(transport="stdio")
