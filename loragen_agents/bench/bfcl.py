"""`bench bfcl`: BFCL's single-turn Python categories through the chat model, scored by BFCL's own checker.

A test: nothing is trained on it and nothing chosen by it. The model sees a row as any user's: its functions as tools,
its messages as the conversation. Where several calls are due at once (`parallel`), they are made one after the other,
as agents with this model do, each behind a report that the one before was done. Where rows come from and how they are
judged is `bfcl_package`'s part.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.messages.utils import convert_to_messages

from loragen_agents.bench import report
from loragen_agents.bench.bfcl_package import PACKAGE, SHA256, VERSION, Checker, Entry
from loragen_agents.bench.display import LiveTable
from loragen_agents.bench.results import Record, RunFolder, results_document
from loragen_agents.bench.statistics import means
from loragen_agents.errors import LoRAGenError
from loragen_agents.support.files import replacing

METRICS: dict[str, str] = {"valid": "Right", "tool": "Right tools"}
MODEL_NAME = "loragen-agents"

# BFCL's words for types -> JSON Schema's.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", "double": "number", "long": "integer"}
# For a model that never says that it is through.
_MOST_CALLS = 12
_DONE = "done"


def openai_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A BFCL function as an OpenAI dict: the same name and description, parameters as JSON Schema."""
    parameters = _schema(function["parameters"])
    return {
        "type": "function",
        "function": {"name": function["name"], "description": function["description"], "parameters": parameters},
    }


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: schema[key] for key in ("description", "enum") if key in schema}
    kind = _TYPES.get(schema.get("type", "string"), schema.get("type", "string"))
    kept["type"] = kind
    if kind == "object":
        properties = schema.get("properties", {})
        kept["properties"] = {name: _schema(inner) for name, inner in properties.items()}
        kept["required"] = [name for name in schema.get("required", ()) if name in properties]
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        kept["items"] = _schema(schema["items"])
        if "enum" in kept:  # BFCL lists an array's values beside the array
            kept["items"].setdefault("enum", kept.pop("enum"))
    return kept


def answer_entry(model: BaseChatModel, entry: Entry) -> dict[str, Any]:
    """What the model calls for one row, in BFCL's format for models with function calling.

    Returns:
        result: [{name: arguments as JSON}, ...], or the text where nothing was called. An error that the model raises
            is its text, as BFCL writes it.
        calls: [{name: arguments}, ...]; a call that can't be read has no arguments.
        latency, input_token_count, output_token_count: over all steps.
        first_token_seconds: of the first step.
    """
    started = time.perf_counter()
    calls: list[dict[str, Any]] = []
    usage: Counter[str] = Counter()
    text, first = "", 0.0
    try:
        bound = model.bind_tools([openai_tool(function) for function in entry.functions])
        messages: list[BaseMessage] = convert_to_messages(list(entry.messages))
        for _ in range(_MOST_CALLS if "parallel" in entry.category else 1):
            message = bound.invoke(messages)
            if message.usage_metadata is not None:
                usage["input_tokens"] += message.usage_metadata["input_tokens"]
                usage["output_tokens"] += message.usage_metadata["output_tokens"]
            first = first or message.response_metadata.get("first_token_ms", 0.0) / 1000
            made = _calls(message)
            if not made:
                text = text or message.text
            # A call that was made already says that the model is through.
            if not made or made[0] in calls:
                break
            calls += made
            if not message.tool_calls:
                break
            done = [ToolMessage(_DONE, tool_call_id=call["id"]) for call in message.tool_calls]
            messages = [*messages, message, *done]
    except LoRAGenError as error:
        text = f"Error during inference: {error}"
    return {
        "result": [{name: json.dumps(arguments)} for call in calls for name, arguments in call.items()] or text,
        "calls": calls,
        "latency": time.perf_counter() - started,
        "input_token_count": usage["input_tokens"],
        "output_token_count": usage["output_tokens"],
        "first_token_seconds": first,
    }


def _calls(message: AIMessage) -> list[dict[str, Any]]:
    read = [{call["name"]: call["args"]} for call in message.tool_calls]
    return read + [{call["name"] or "": {}} for call in message.invalid_tool_calls]


def score_entry(entry: Entry, calls: Sequence[Mapping[str, Any]], check: Checker) -> tuple[dict[str, float], Any]:
    """The metrics of one row, and what BFCL says is wrong (None where nothing is).

    `valid` is BFCL's verdict; `tool` whether the names of the functions are right, whatever their arguments.
    """
    if entry.answer is None:
        right = bool(calls) == (entry.category == "live_relevance")
        return {"valid": float(right)}, None if right else {"error": ["a call" if calls else "no call"]}
    names = Counter(name for call in calls for name in call)
    due = Counter(name for call in entry.answer for name in call)
    if not calls:
        return {"valid": 0.0, "tool": 0.0}, {"error": ["no call"]}
    verdict = check(entry.functions, calls, entry.answer, entry.category)
    right = bool(verdict["valid"])
    return {"valid": float(right), "tool": float(names == due)}, None if right else verdict


def run_bfcl(
    entries: Mapping[str, Sequence[Entry]],
    model: BaseChatModel,
    check: Checker,
    settings: Mapping[str, Any],
    *,
    out: Path | None,
    resume: bool,
    command: str,
) -> dict[str, Any]:
    """Ask every row that is not in `out` yet and give the results document; Ctrl-C leaves what was scored until then.

    Args:
        entries: rows by category.
        settings: everything of the model's that decides results.

    Raises:
        DataError: `out` can't take the run (see `RunFolder`).
    """
    title = f"{VERSION}, single turn, Python"
    task = {
        "name": "bfcl",
        "title": title,
        "variants": "Category",
        "metrics": METRICS,
        "package": PACKAGE,
        "sha256": SHA256,
    }
    counts = {category: len(rows) for category, rows in entries.items()}
    folder = RunFolder(out, {"task": {**task, "rows": counts}, **settings, "equal_tokens": 1}, resume=resume)
    table = LiveTable(title, METRICS, list(entries), {}, folder.records, total=sum(counts.values()))
    with folder.recording() as outcome, table:
        _ask(entries, model, check, folder, table)
    summary = _summary(folder.records)
    results = results_document(folder.header, summary, missing={}, complete=outcome.complete, command=command)
    folder.write_results(results)
    if out is not None:
        write_bfcl_files(out, folder.records)
        report.write_report(out, results)
    return results


def _ask(
    entries: Mapping[str, Sequence[Entry]],
    model: BaseChatModel,
    check: Checker,
    folder: RunFolder,
    progress: Callable[[Record], None],
) -> None:
    """Categories take turns, row by row, so that a run that is stopped has something of each."""
    done = folder.done
    for place in range(max(map(len, entries.values()), default=0)):
        for category, rows in entries.items():
            if place >= len(rows) or (category, rows[place].id) in done:
                continue
            entry = rows[place]
            answered = answer_entry(model, entry)
            calls, first = answered.pop("calls"), answered.pop("first_token_seconds")
            scores, error = score_entry(entry, calls, check)
            record = {
                "variant": category,
                "id": entry.id,
                **answered,
                "scores": scores,
                "error": error,
                "answer": entry.answer,
                "cost": {"first_token_seconds": first},
            }
            folder.add(record)
            progress(record)


def _summary(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    by_category: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_category[record["variant"]].append(record)
    summary = {}
    for category in sorted(by_category, key=lambda name: ("live" in name, name)):
        found = by_category[category]
        columns = {metric: [r["scores"][metric] for r in found if metric in r["scores"]] for metric in METRICS}
        summary[category] = {
            "title": category.replace("_", " "),
            "scored": len(found),
            "metrics": means({metric: column for metric, column in columns.items() if column}),
            "by_source": {},
            "by_kind": {},
            "cost": None,
        }
    return summary


def write_bfcl_files(folder: Path, records: Iterable[Record]) -> None:
    """Write `result/` and `score/` as BFCL's own scripts do: a folder a model, then live or not, a file a category."""
    by_category: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_category[record["variant"]].append(record)
    for category, found in by_category.items():
        group = "live" if category.startswith("live") else "non_live"
        keys = ("id", "result", "input_token_count", "output_token_count", "latency")
        results = [{key: record[key] for key in keys} for record in found]
        right = sum(record["scores"]["valid"] for record in found)
        counts = {"accuracy": right / len(found), "correct_count": int(right), "total_count": len(found)}
        wrong = [
            {
                "id": record["id"],
                "model_name": MODEL_NAME,
                "test_category": category,
                "valid": False,
                **(record["error"] or {}),
                "model_result": record["result"],
                "possible_answer": record["answer"],
            }
            for record in found
            if not record["scores"]["valid"]
        ]
        for kind, lines in (("result", results), ("score", [counts, *wrong])):
            path = folder / kind / MODEL_NAME / group / f"{VERSION}_{category}_{kind}.json"
            with replacing(path) as temporary:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                temporary.write_text(text, encoding="utf-8")
