"""Tools that tell about this machine, with psutil. They change nothing."""

import time
from collections.abc import Callable

from loragen_agents.assistant.results import Result, Table, table_result
from loragen_agents.assistant.tools.context import Context
from loragen_agents.assistant.tools.files import size_text

PROCESSES = 10


def tools(context: Context) -> dict[str, Callable[..., Result]]:
    import psutil

    def disk_space() -> Result:
        usage = psutil.disk_usage(str(context.folder.root))
        return _usage("disk space", usage.total, usage.used, usage.free, usage.percent)

    def memory_usage() -> Result:
        memory = psutil.virtual_memory()
        return _usage("memory", memory.total, memory.total - memory.available, memory.available, memory.percent)

    def list_processes() -> Result:
        fields = ["pid", "name", "memory_info"]
        running = list(psutil.process_iter(fields))
        for process in running:
            _cpu(process)
        time.sleep(0.3)  # processor time is measured from the first asking to the second
        rows = [
            (process.info["pid"], process.info["name"] or "?", _cpu(process), process.info["memory_info"].rss)
            for process in running
            if process.info["memory_info"]
        ]
        rows.sort(key=lambda row: (-row[2], -row[3]))
        shown = [(pid, name, f"{cpu:.0f}%", size_text(memory)) for pid, name, cpu, memory in rows[:PROCESSES]]
        columns = ("Process", "Name", "CPU", "Memory")
        return table_result(f"{len(rows)} processes; the busiest:", columns, list(shown), outside=True)

    def _cpu(process: "psutil.Process") -> float:
        try:
            return float(process.cpu_percent())
        except psutil.Error:  # it has ended, or is not ours to look at
            return 0.0

    def battery() -> Result:
        sensors = getattr(psutil, "sensors_battery", None)
        state = sensors() if sensors else None
        if state is None:
            return Result("This machine has no battery.")
        plugged = "charging" if state.power_plugged else "not charging"
        return Result(f"The battery is {state.percent:.0f}% full and {plugged}.")

    return {tool.__name__: tool for tool in (disk_space, memory_usage, list_processes, battery)}


def _usage(what: str, total: float, used: float, free: float, percent: float) -> Result:
    rows = (("Total", size_text(total)), ("Used", f"{size_text(used)} ({percent:.0f}%)"), ("Free", size_text(free)))
    text = f"{size_text(free)} of {size_text(total)} {what} is free ({percent:.0f}% used)."
    return Result(text, Table(("", what.capitalize()), rows))
