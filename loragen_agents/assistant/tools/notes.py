"""Tools for notes, the to-do list, reminders and timers. Where they are kept is the part of `store`.

What was kept may be the words of others, who sent them to the user: results that repeat it are text from outside.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from loragen_agents.assistant.results import Result, table_result
from loragen_agents.assistant.tools.context import Context, ToolError
from loragen_agents.assistant.tools.dates import day_text
from loragen_agents.assistant.tools.moments import duration, moment
from loragen_agents.assistant.tools.store import Entry, EntryKind


def note_tools(context: Context) -> dict[str, Callable[..., Result]]:
    store, now = context.store, context.now

    def take_note(text: str) -> Result:
        entry = store.add("note", text, now())
        return Result(f"Noted as number {entry.number}: {entry.text}")

    def list_notes() -> Result:
        return _entries("note", store.open_entries("note"))

    def search_notes(text: str) -> Result:
        found = store.search("note", text)
        return _entries("note", found) if found else Result(f"No note says anything about {text}.")

    def delete_note(note: str) -> Result:
        entry = store.find("note", note)
        store.delete(entry)
        return Result(f"Deleted the note: {entry.text}", outside=True)

    return {tool.__name__: tool for tool in (take_note, list_notes, search_notes, delete_note)}


def task_tools(context: Context) -> dict[str, Callable[..., Result]]:
    store, now = context.store, context.now

    def add_task(task: str) -> Result:
        entry = store.add("task", task, now())
        return Result(f"On the list as number {entry.number}: {entry.text}")

    def list_tasks() -> Result:
        return _entries("task", store.open_entries("task"))

    def complete_task(task: str) -> Result:
        entry = store.find("task", task)
        store.close(entry, now())
        left = len(store.open_entries("task"))
        return Result(f"Done: {entry.text} ({left} left)", outside=True)

    def delete_task(task: str) -> Result:
        entry = store.find("task", task)
        store.delete(entry)
        return Result(f"Removed from the list: {entry.text}", outside=True)

    return {tool.__name__: tool for tool in (add_task, list_tasks, complete_task, delete_task)}


def reminder_tools(context: Context) -> dict[str, Callable[..., Result]]:
    store, now = context.store, context.now

    def add_reminder(text: str, when: str) -> Result:
        try:
            due = moment(when, now())
        except ToolError:
            due = now() + duration(when)  # "20 minutes"
        if (due.hour, due.minute) == (0, 0) and due.date() > now().date():
            due = due.replace(hour=9)  # a day without a time: in the morning
        if due <= now():
            raise ToolError(f"{when!r} is {day_text(due)}, {due:%H:%M}, which is over; give a time to come")
        entry = store.add("reminder", text, now(), due)
        return Result(f"Reminder on {day_text(due)}, {due:%H:%M}: {entry.text}")

    def list_reminders() -> Result:
        return _entries("reminder", store.open_entries("reminder"))

    def delete_reminder(reminder: str) -> Result:
        entry = store.find("reminder", reminder)
        store.delete(entry)
        return Result(f"Cancelled the reminder: {entry.text}", outside=True)

    return {tool.__name__: tool for tool in (add_reminder, list_reminders, delete_reminder)}


def timer_tools(context: Context) -> dict[str, Callable[..., Result]]:
    store, now = context.store, context.now

    def start_timer(duration: str, label: str = "") -> Result:
        length = _length(duration)
        due = now() + length
        entry = store.add("timer", label.strip() or "timer", now(), due)
        return Result(f"Timer {entry.number} ({entry.text}) rings in {time_left(length)}, at {due:%H:%M:%S}.")

    def list_timers() -> Result:
        entries = store.open_entries("timer")
        if not entries:
            return Result("No timer is running.")
        rows = [(e.number, e.text, time_left(e.due - now()) if e.due else "") for e in entries]
        return table_result(_count(len(entries), "timer"), ("No.", "Timer", "Left"), list(rows), outside=True)

    def cancel_timer(label: str = "") -> Result:
        entry = store.find("timer", label)
        store.delete(entry)
        return Result(f"Stopped timer {entry.number} ({entry.text}).", outside=True)

    return {tool.__name__: tool for tool in (start_timer, list_timers, cancel_timer)}


def time_left(length: timedelta) -> str:
    """`1 h 5 min`, `3 min 20 s`, `12 s`."""
    seconds = max(0, round(length.total_seconds()))
    hours, minutes, rest = seconds // 3600, seconds % 3600 // 60, seconds % 60
    parts = [(hours // 24, "d"), (hours % 24, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def _length(text: str) -> timedelta:
    return duration(text)


def _entries(kind: EntryKind, entries: list[Entry]) -> Result:
    if not entries:
        return Result(f"There are no {kind}s.")
    if kind == "reminder":
        rows = [(e.number, e.text, _when(e.due)) for e in entries]
        return table_result(_count(len(rows), kind), ("No.", "Reminder", "When"), list(rows), outside=True)
    plain = [(e.number, e.text) for e in entries]
    return table_result(f"{_count(len(plain), kind)}:", ("No.", kind.capitalize()), list(plain), outside=True)


def _when(due: datetime | None) -> str:
    return f"{day_text(due)}, {due:%H:%M}" if due else ""


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
