"""Calls of your own functions, without an agent: python examples/own_functions.py ["Set a timer for 5 minutes"]

The model turns a request into the name of a function and its arguments; running it is your affair. So it fits where a
button or a form would be: one request, one call.
"""

import argparse
from collections.abc import Callable
from typing import Any, Literal

from loragen_agents import LoRAGenChatModel
from loragen_agents.support.console import say

REQUESTS = ("Set a timer for 5 minutes", "Convert 12 miles to kilometres")
_METRES = {"metres": 1.0, "kilometres": 1000.0, "miles": 1609.344, "feet": 0.3048}


def set_timer(minutes: float, label: str = "timer") -> str:
    """Set a timer that rings after some minutes."""
    return f"{label!r} rings in {minutes:g} minutes"


def convert_length(
    value: float,
    from_unit: Literal["metres", "kilometres", "miles", "feet"],
    to_unit: Literal["metres", "kilometres", "miles", "feet"],
) -> str:
    """Convert a length or distance from one unit to another."""
    return f"{value:g} {from_unit} are {value * _METRES[from_unit] / _METRES[to_unit]:.4g} {to_unit}"


FUNCTIONS: dict[str, Callable[..., str]] = {function.__name__: function for function in (set_timer, convert_length)}


def run_request(model: Any, request: str) -> str:
    """What the called function gives, or what the model says where none serves the request."""
    message = model.invoke(request)
    if not message.tool_calls:
        return message.text
    call = message.tool_calls[0]
    return FUNCTIONS[call["name"]](**call["args"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("request", nargs="*", help="what to do; without it, one request for each function")
    model = LoRAGenChatModel(tools=list(FUNCTIONS.values()))
    for request in parser.parse_args().request or REQUESTS:
        say(request, style="bold")
        say(f"  {run_request(model, request)}")


if __name__ == "__main__":
    main()
