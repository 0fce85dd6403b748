"""Tools for dates and the time of day. How dates are read is the part of `moments`."""

from collections.abc import Callable
from datetime import datetime

from loragen_agents.assistant.results import Result
from loragen_agents.assistant.tools.context import Context
from loragen_agents.assistant.tools.moments import later, moment, time_zone


def tools(context: Context) -> dict[str, Callable[..., Result]]:
    now = context.now

    def today() -> Result:
        return Result(f"Today is {day_text(now())}.")

    def current_time(place: str = "") -> Result:
        if place.strip().lower() in ("", "here", "now", "local"):
            return Result(f"It is {now():%H:%M} on {day_text(now())}.")
        there = now().astimezone(time_zone(place))
        return Result(f"In {place.strip()} it is {there:%H:%M} on {day_text(there)} ({there.tzname()}).")

    def day_of_week(date: str) -> Result:
        day = moment(date, now())
        return Result(f"{day_text(day, weekday=False)} is a {day:%A}.")

    def days_between(end: str, start: str = "") -> Result:
        first = moment(start or "today", now())
        last = moment(end, now())
        count = (last.date() - first.date()).days
        days = "1 day" if abs(count) == 1 else f"{abs(count)} days"
        between = f"from {day_text(first)} to {day_text(last)}"
        return Result(f"It is {days} {between}." if count >= 0 else f"It is {days} back {between}.")

    def date_after(interval: str, start: str = "") -> Result:
        first = moment(start or "today", now())
        return Result(f"{interval.strip()} from {day_text(first)} is {day_text(later(interval, first))}.")

    return {tool.__name__: tool for tool in (today, current_time, day_of_week, days_between, date_after)}


def day_text(day: datetime, *, weekday: bool = True) -> str:
    """`Friday, 27 November 2026`: the month in letters, which nobody can misread."""
    text = f"{day.day} {day:%B} {day.year}"
    return f"{day:%A}, {text}" if weekday else text
