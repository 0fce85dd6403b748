"""Tools, and the ordered set of them that a small model is specialised on. Imports neither torch nor LangChain."""

from loragen_agents.registry.registry import ToolRegistry
from loragen_agents.registry.tool import InputFormat, Tool

__all__ = ["InputFormat", "Tool", "ToolRegistry"]
