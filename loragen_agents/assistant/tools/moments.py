"""Dates and times in people's words: `next Friday`, `3 May`, `tomorrow at half past seven`, `in two weeks`.

dateparser reads most of them; what it doesn't know (clock times in words, fixed holidays, ends of months and weeks) is
put into words that it does. Knows nothing of tools.
"""

import re
import warnings
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

from loragen_agents.assistant.tools.context import ToolError
from loragen_agents.assistant.tools.maths import NUMBER_WORDS

_WORDS = {word: number for number, word in enumerate(NUMBER_WORDS)}
_TENS = {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "ninety": 90}
_HOLIDAYS = {
    "christmas eve": "24 December",
    "christmas day": "25 December",
    "christmas": "25 December",
    "boxing day": "26 December",
    "new year's eve": "31 December",
    "new years eve": "31 December",
    "new year's day": "1 January",
    "new year": "1 January",
    "valentine's day": "14 February",
    "valentines day": "14 February",
    "halloween": "31 October",
}
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def moment(text: str, now: datetime) -> datetime:
    """The date and time that `text` means, seen from `now`; without a time of day, midnight.

    "next Friday" is the Friday to come; dates without a year are the next ones to come.

    Raises:
        ToolError: it can't be read as a date or time.
    """
    import dateparser

    plain = _in_known_words(text, now)
    named = _weekday_of_a_week(plain, now)
    if named is not None:
        return named
    settings = {
        "RELATIVE_BASE": now.replace(tzinfo=None),
        "PREFER_DATES_FROM": "future",
        "PREFER_DAY_OF_MONTH": "first",
        "DATE_ORDER": "DMY",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dates without a year, which the settings decide
        try:
            found = dateparser.parse(plain, languages=["en"], settings=settings)
        except (OverflowError, ValueError):
            found = None
    if found is None:
        raise ToolError(f"{text!r} can't be read as a date or time; try 3 May, next Friday or tomorrow at 5pm")
    if not _has_time(plain):
        found = found.replace(hour=0, minute=0, second=0, microsecond=0)
    return found.replace(tzinfo=now.tzinfo) if found.tzinfo is None else found.astimezone(now.tzinfo)


def duration(text: str) -> timedelta:
    """How long `text` says: `10 minutes`, `an hour and a half`, `1h 30m`, `1:30`.

    Raises:
        ToolError: it can't be read, or is not longer than nothing.
    """
    plain = _numbers(text.lower())
    plain = re.sub(r"\bhalf an hour\b", "30 minutes", plain)
    plain = re.sub(r"\bquarter of an hour\b", "15 minutes", plain)
    plain = re.sub(r"\b(\d+) (hour|minute)s? and a half\b", r"\1.5 \2s", plain)
    plain = re.sub(r"\b(?:an?|one) (hour|minute) and a half\b", r"1.5 \1s", plain)
    plain = re.sub(r"\ban?\b", "1", plain)
    if clock := re.fullmatch(r"\s*(\d{1,2}):(\d{2})(?::(\d{2}))?\s*", plain):
        first, second, third = (int(part or 0) for part in clock.groups())
        seconds = first * 3600 + second * 60 + third if clock[3] else first * 60 + second
        return _positive(timedelta(seconds=seconds), text)
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    found = re.findall(r"(\d+(?:\.\d+)?)\s*-?(seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|[smhdw])\b", plain)
    if not found:
        raise ToolError(f"{text!r} is no length of time; try 10 minutes or 1 hour 30 minutes")
    return _positive(timedelta(seconds=sum(float(number) * units[unit[0]] for number, unit in found)), text)


def later(interval: str, start: datetime) -> datetime:
    """The date that lies `interval` (`10 days`, `3 weeks`, `2 months before`) after `start`.

    Raises:
        ToolError: the interval can't be read or leads out of the calendar.
    """
    from dateutil.relativedelta import relativedelta

    plain = re.sub(r"\ban?\b", "1", _numbers(interval.lower()))
    found = re.findall(r"(-?\d+)\s*-?(day|week|month|year|hour|minute)s?\b", plain)
    if not found:
        raise ToolError(f"{interval!r} is no number of days, weeks, months or years")
    back = -1 if re.search(r"\b(?:before|ago|earlier)\b", plain) else 1
    try:
        for number, unit in found:
            start = start + relativedelta(**{f"{unit}s": back * int(number)})  # type: ignore[arg-type]
    except (OverflowError, ValueError) as error:
        raise ToolError(f"{interval!r} leads out of the calendar") from error
    return start


# Places whose time zone is not called after them.
_PLACES = {
    "uk": "Europe/London", "england": "Europe/London", "britain": "Europe/London", "scotland": "Europe/London",
    "germany": "Europe/Berlin", "munich": "Europe/Berlin", "france": "Europe/Paris", "spain": "Europe/Madrid",
    "italy": "Europe/Rome", "milan": "Europe/Rome", "geneva": "Europe/Zurich", "switzerland": "Europe/Zurich",
    "india": "Asia/Kolkata", "mumbai": "Asia/Kolkata", "delhi": "Asia/Kolkata", "new delhi": "Asia/Kolkata",
    "bangalore": "Asia/Kolkata", "china": "Asia/Shanghai", "beijing": "Asia/Shanghai", "shenzhen": "Asia/Shanghai",
    "japan": "Asia/Tokyo", "osaka": "Asia/Tokyo", "kyoto": "Asia/Tokyo", "korea": "Asia/Seoul",
    "south korea": "Asia/Seoul", "california": "America/Los_Angeles", "san francisco": "America/Los_Angeles",
    "seattle": "America/Los_Angeles", "la": "America/Los_Angeles", "nyc": "America/New_York",
    "boston": "America/New_York", "washington": "America/New_York", "miami": "America/New_York",
    "texas": "America/Chicago", "dallas": "America/Chicago", "brazil": "America/Sao_Paulo",
    "rio": "America/Sao_Paulo", "rio de janeiro": "America/Sao_Paulo", "canberra": "Australia/Sydney",
    "turkey": "Europe/Istanbul", "russia": "Europe/Moscow", "ukraine": "Europe/Kyiv", "egypt": "Africa/Cairo",
    "kenya": "Africa/Nairobi", "south africa": "Africa/Johannesburg", "cape town": "Africa/Johannesburg",
    "nigeria": "Africa/Lagos", "sweden": "Europe/Stockholm", "norway": "Europe/Oslo", "poland": "Europe/Warsaw",
    "netherlands": "Europe/Amsterdam", "portugal": "Europe/Lisbon", "greece": "Europe/Athens",
    "utc": "UTC", "gmt": "UTC", "cet": "Europe/Paris", "est": "America/New_York", "pst": "America/Los_Angeles",
}  # fmt: skip


def time_zone(place: str) -> ZoneInfo:
    """The time zone of a city, a country or a zone's own name.

    Raises:
        ToolError: none is known by this name.
    """
    plain = " ".join(place.lower().split("(")[0].replace(",", " ").split()).strip(" ?.")
    if plain in _PLACES:
        return ZoneInfo(_PLACES[plain])
    wanted = plain.replace(" ", "_")
    for name in sorted(available_timezones()):
        if wanted in (name.lower(), name.lower().rsplit("/", 1)[-1]):
            return ZoneInfo(name)
    if " " in plain:  # "Paris France", "Sydney, Australia"
        return time_zone(plain.rsplit(" ", 1)[0])
    raise ToolError(f"no time zone is known for {place!r}; try a large city nearby, or a zone such as Europe/Paris")


def _positive(length: timedelta, text: str) -> timedelta:
    if not timedelta(0) < length <= timedelta(days=366):
        raise ToolError(f"{text!r} is no length of time between a second and a year")
    return length


def _numbers(text: str) -> str:
    """Number words up to ninety as digits."""
    words = {**_WORDS, **_TENS, "couple of": 2}
    text = re.sub(r"\b(twenty|thirty|forty|fifty)[- ](one|two|three|four|five|six|seven|eight|nine)\b", _compound, text)
    return re.sub(r"\b(" + "|".join(sorted(words, key=len, reverse=True)) + r")\b", lambda m: str(words[m[1]]), text)


def _compound(match: re.Match[str]) -> str:
    return str({"twenty": 20, **_TENS}[match[1]] + _WORDS[match[2]])


def _in_known_words(text: str, now: datetime) -> str:
    plain = " ".join(text.lower().replace("\u2019", "'").split()).strip(" ?.!")
    plain = re.sub(r"^(?:on|at|by|until|for|this coming|the coming)\s+", "", plain)
    for name, date in _HOLIDAYS.items():
        plain = re.sub(rf"\b{name}\b", date, plain)
    plain = re.sub(r"\bhalf past (\w+)", lambda m: _clock(m[1], 30), plain)
    plain = re.sub(r"\b(?:a )?quarter past (\w+)", lambda m: _clock(m[1], 15), plain)
    plain = re.sub(r"\b(?:a )?quarter to (\w+)", lambda m: _clock(m[1], -15), plain)
    plain = re.sub(r"\b(\w+) o'clock", lambda m: _clock(m[1], 0), plain)
    plain = re.sub(r"\bnoon\b|\bmidday\b", "12:00", plain)
    plain = re.sub(r"\bmidnight\b", "00:00", plain)
    plain = re.sub(r"\bthis (?:evening|night)\b|\btonight\b", "today 20:00" if not _has_time(plain) else "today", plain)
    plain = re.sub(
        r"\bthis (morning|afternoon)\b", lambda m: f"today {'9:00' if m[1] == 'morning' else '15:00'}", plain
    )
    plain = re.sub(r"\btomorrow (morning|evening)\b", _tomorrow, plain)
    plain = re.sub(r"^(?:the )?end of (?:the|this) month$", _month_end(now), plain)
    plain = re.sub(r"^the (\d{1,2})(?:st|nd|rd|th)$", lambda m: _day_to_come(int(m[1]), now), plain)
    return _numbers(plain)


def _tomorrow(match: re.Match[str]) -> str:
    return f"tomorrow {'9:00' if match[1] == 'morning' else '19:00'}"


def _clock(hour: str, minutes: int) -> str:
    number = _WORDS.get(hour) or (int(hour) if hour.isdigit() else None)
    if number is None:
        return f"{hour} {minutes}"
    total = (number * 60 + minutes) % (24 * 60)
    return f"{total // 60}:{total % 60:02d}"


def _has_time(plain: str) -> bool:
    return bool(re.search(r"\d:\d|\d\s*(?:am|pm)\b|\b(?:hour|minute|second|min|hr)s?\b|\bnow\b|o'clock", plain))


def _month_end(now: datetime) -> str:
    first_of_next = (now.replace(day=28) + timedelta(days=4)).replace(day=1)
    return f"{first_of_next - timedelta(days=1):%Y-%m-%d}"


def _day_to_come(day: int, now: datetime) -> str:
    month = now.replace(day=1)
    for _ in range(3):
        try:
            found = month.replace(day=day)
        except ValueError:
            found = None
        if found is not None and found.date() >= now.date():
            return f"{found:%Y-%m-%d}"
        month = (month.replace(day=28) + timedelta(days=4)).replace(day=1)
    return f"the {day}"


def _weekday_of_a_week(plain: str, now: datetime) -> datetime | None:
    """`Monday next week` and `next week Monday`: the day of the week after this one."""
    match = re.fullmatch(r"(\w+) next week|next week(?: on)? (\w+)", plain)
    day = (match[1] or match[2]) if match else None
    if day not in _WEEKDAYS:
        return None
    monday = now - timedelta(days=now.weekday()) + timedelta(days=7)
    return (monday + timedelta(days=_WEEKDAYS.index(day))).replace(hour=0, minute=0, second=0, microsecond=0)
