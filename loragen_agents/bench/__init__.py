"""The benchmarks: tasks, variants, runner, costs and report."""

from pathlib import Path


def everyday_calls() -> Path:
    """The file of 60 everyday requests to the assistant's tools: 40 take one call, 10 two, 10 none."""
    return Path(__file__).with_name("everyday.jsonl")
