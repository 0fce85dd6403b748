"""Requests for tools that no published request calls, made from the tools' own descriptions and argument examples.

"Retrieve the length of a bridge" with an argument `bridge_id` becomes "Give me the length of a bridge with the bridge
id K7XQ2." Such requests repeat the description's words, which makes them easy; they are there for the thousands of
names and argument schemas that they bring. The phrases stand in `phrases/described.yaml`.
"""

import random
import re
import string
from typing import Any

from loragen_agents.data.augmentation import split_words
from loragen_agents.data.phrases import phrases
from loragen_agents.data.records import Call, CallRecord, DataSet, ToolRecord
from loragen_agents.data.templates import ValueBook, value_book

SOURCE = "described"
MAX_ARGUMENTS = 4


def build_described(data: DataSet, *, copies: int = 3, seed: int = 0) -> DataSet:
    """Make `copies` requests for every training tool of `data` that no request calls.

    Tools that are held out, or whose description does not open with a verb, are passed over.
    """
    called = {call.tool for record in data.calls for call in record.calls}
    skipped = called | data.held_out_tools()
    book = value_book()
    tools: dict[str, ToolRecord] = {}
    calls: list[CallRecord] = []
    for tool in data.tools.values():
        if tool.id in skipped or not re.match(r"[A-Z][a-z]+ \w", tool.description):
            continue
        rng = random.Random(f"{seed}/{tool.id}")
        made = {record.query: record for record in (_request(tool, book, rng) for _ in range(copies))}
        tools[tool.id] = tool
        calls += made.values()
    return DataSet(tools, tuple(calls))


def _request(tool: ToolRecord, book: ValueBook, rng: random.Random) -> CallRecord:
    given = [name for name in tool.properties if name in tool.required or rng.random() < 0.35][:MAX_ARGUMENTS]
    given = [name for name in given if tool.properties[name].get("type") in ("string", "integer", "number", "boolean")]
    arguments = {name: argument_value(name, tool.properties[name], book, rng) for name in given}
    clauses = [_clause(name, value, rng) for name, value in arguments.items()]
    rng.shuffle(clauses)
    # A clause that starts a sentence of its own comes last.
    clauses.sort(key=lambda clause: clause.startswith("."))
    texts = phrases("described")
    description = tool.description.split(" (e.g")[0].strip().rstrip(".")
    verb, _, rest = description.partition(" ")
    kind = next((kind for kind, verbs in texts["verbs"].items() if verb in verbs), "other")
    phrase = verb[0].lower() + description[1:]
    frame = rng.choice(texts[kind])
    query = frame.replace("<rest>", rest).replace("<vp>", phrase).replace("<Vp>", description)
    query = query.replace("<with>", _joined(clauses))
    return CallRecord(re.sub(r"([.!?]['\"]?)[.?]$", r"\1", query), (Call(tool.id, arguments),), SOURCE, "train")


def _joined(clauses: list[str]) -> str:
    """Clauses one behind the other: "and" before the second of two that open alike, commas between more."""
    text = ""
    for index, clause in enumerate(clauses):
        joint = " and" if index and index == len(clauses) - 1 and clause.startswith((" with", " for", " in")) else ""
        text += joint + clause
    return text


def _clause(name: str, value: Any, rng: random.Random) -> str:
    texts = phrases("described")
    words = " ".join(split_words(name)) or name
    if isinstance(value, bool):
        return rng.choice(texts["flags"][value]).format(words=words)
    last = words.split()[-1]
    options = next(entry["say"] for entry in texts["clauses"] if last in entry["ends"] or "" in entry["ends"])
    return rng.choice(options).format(words=words, Words=words[0].upper() + words[1:], value=value)


def argument_value(name: str, schema: dict[str, Any], book: ValueBook, rng: random.Random) -> Any:
    """Draw a value for an argument: of its enumeration, of the examples in its description, or by its name and type."""
    kind, words = schema["type"], split_words(name)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if kind == "boolean":
        return rng.random() < 0.6
    examples = _examples(schema.get("description", ""))
    if kind == "integer":
        for word, low, high in (("year", 1950, 2024), ("id", 100, 99999), ("number", 100, 99999), ("age", 2, 95)):
            if word in words:
                return rng.randint(low, high)
        numbers = [int(text) for text in examples if re.fullmatch(r"-?\d{1,9}", text)]
        invented = rng.randint(1, rng.choice((20, 500)))
        return rng.choice(numbers) if numbers and rng.random() < 0.5 else invented
    if kind == "number":
        decimals = [float(text) for text in examples if re.fullmatch(r"-?\d{1,7}(\.\d+)?", text)]
        drawn = rng.choice((round(rng.uniform(0, 10), 2), round(rng.uniform(1, 500), 1), rng.randint(1, 1000)))
        return _plain(rng.choice(decimals)) if decimals and rng.random() < 0.5 else drawn
    for entry in phrases("described")["values"]:
        if set(words[-2:]) & set(entry["words"]):
            if entry["list"] == "id":
                return _code(rng)
            listed = entry["list"] not in ("full_name", "title", "city", "company", "topic", "ware")
            if listed or not examples or rng.random() < 0.5:
                return book.draw(entry["list"], rng)
            break
    texts = [text for text in examples if 1 < len(text) <= 40 and not re.search(r"yyyy|\betc\b|/mm", text.lower())]
    return rng.choice(texts) if texts else book.draw(rng.choice(("topic", "word", "title")), rng)


def _examples(description: str) -> list[str]:
    match = re.search(r"\(e\.g\.,? ([^)]*)\)", description)
    return [part.strip(" .'\"") for part in re.split(r", | or ", match[1]) if part.strip(" .'\"")] if match else []


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _code(rng: random.Random) -> str:
    alphabet = rng.choice((string.ascii_uppercase + string.digits, string.ascii_letters + string.digits, string.digits))
    code = "".join(rng.choices(alphabet, k=rng.randint(4, 10)))
    return f"{rng.choice(('ID', 'P', 'X', 'AB', 'ord'))}-{code}" if rng.random() < 0.15 else code
