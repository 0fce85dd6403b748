"""The assistant in scripts: what is printed, the exit codes, and what is kept."""

import asyncio
import io
import json
import sys
from typing import Any

import pytest
from rich.console import Console

from loragen_agents import cli
from loragen_agents.assistant.agent import Assistant
from loragen_agents.assistant.screen import Screen
from loragen_agents.assistant.scripts import run_requests
from loragen_agents.assistant.sessions import KEPT_SESSIONS, Sessions, data_folder
from loragen_agents.assistant.tools.catalog import chosen_tools
from loragen_agents.assistant.turns import Turn
from loragen_agents.errors import DataError
from tests.scripted_chat import call, scripted, tool_context


@pytest.fixture
def context(tmp_path):
    return tool_context(tmp_path)


@pytest.fixture
def chat(context, tmp_path, monkeypatch, capsys) -> Any:
    """Runs the command line with a scripted model; gives exit code, stdout and stderr."""
    monkeypatch.setenv("LORAGEN_AGENTS_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("loragen_agents.assistant.loading.fetch_models", lambda choice: None)

    def run(*arguments: str, script: Any = (), stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr("loragen_agents.assistant.loading.load_chat_model", lambda choice: scripted(*script))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        try:
            code = cli.main(["chat", "--root", str(context.folder.root), *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_one_request(chat):
    code, out, _ = chat("What is 2 + 2?", script=[call("calculator", expression="2 + 2"), "Four."])
    assert code == 0 and "2 + 2 = 4" in out and out.rstrip().endswith("Four.")
    assert "\x1b" not in out and "prompt tokens" not in out


def test_a_request_on_stdin(chat):
    code, out, _ = chat(script=["Hi."], stdin="Hello\n")
    assert (code, out) == (0, "  Hi.\n")


def test_requests_by_line(chat):
    code, out, _ = chat("--lines", script=["One.", "Two."], stdin="first\n\nsecond\n")
    assert (code, out) == (0, "> first\n  One.\n\n> second\n  Two.\n")


def test_json_is_one_object_a_step(chat):
    code, out, _ = chat("--json", "List", script=[call("list_files"), "Two\u2028 files."])
    step, answer = map(json.loads, out.splitlines())
    assert code == 0 and out.isascii()
    assert step["kind"] == "call" and step["tool"] == "list_files" and step["columns"] == ["Name", "Size", "Changed"]
    assert [row[0] for row in step["rows"]] == ["plan.md", "shopping.txt"]
    assert answer["kind"] == "answer" and answer["ending"] == "answered" and answer["figures"]["prompt_tokens"] == 31


@pytest.mark.parametrize(
    ("arguments", "script", "code"),
    [
        (["Read it"], [call("read_file", path="none.txt"), "It is not there."], 1),
        (["Delete it"], [call("delete_file", path="shopping.txt")], 1),
        (["--yes", "Delete it"], [call("delete_file", path="shopping.txt"), "Done."], 0),
        (["--dry-run", "Delete it"], [call("delete_file", path="shopping.txt"), "Done."], 0),
        (["--max-steps", "1", "Go"], [call("today"), "x"], 1),
        (["Go", "--tools", "nonsense"], [], 2),
        (["Go", "--root", "/not/there"], [], 2),
        (["Go", "--max-steps", "0"], [], 2),
        (["Go", "--mcp", "/not/there.json"], [], 2),
        (["  "], [], 2),
        (["--stay", "Go"], [], 2),
        (["--json"], [], 2),
        (["--nonsense"], [], 2),
    ],
)
def test_exit_codes(chat, context, arguments, script, code):
    given, out, err = chat(*arguments, script=script)
    assert given == code
    assert out if code == 0 else out or err
    assert (context.folder.root / "shopping.txt").exists() is ("--yes" not in arguments)


def test_usage_errors_are_json_too(chat):
    code, out, _ = chat("--json", "Go", "--tools", "nonsense")
    assert code == 2 and "nonsense" in json.loads(out)["error"]["message"]


def test_sessions_are_kept_and_go_on(chat):
    chat("--system", "Be brief.", "First", script=["One."])
    code, _, _ = chat("--continue", "Second", script=["Two."])
    kept = Sessions(data_folder()).last()
    assert code == 0 and kept is not None and kept.system == "Be brief."
    assert [turn.request for turn in kept.turns] == ["First", "Second"]


class TestSessions:
    def test_names_are_plain(self, tmp_path):
        sessions = Sessions(tmp_path)
        assert sessions.save_as("trip 2", "", [Turn("Hi")]).is_file()
        assert sessions.names() == ["trip 2"] and sessions.load("trip 2").turns[0].request == "Hi"
        for name in ("../x", "a/b", "", ".hidden", "x" * 99):
            with pytest.raises(DataError):
                sessions.save_as(name, "", [])
        with pytest.raises(DataError, match="there is trip 2"):
            sessions.load("other")

    def test_damaged_files_are_passed_over_and_named(self, tmp_path):
        sessions = Sessions(tmp_path)
        session = sessions.new()
        session.turns.append(Turn("Hi"))
        session.save()
        for number, text in enumerate(["{", '{"format": 1}', '{"format": 9}', "[]"]):
            (tmp_path / "sessions" / f"9{number}.json").write_text(text)
            with pytest.raises(DataError, match=f"9{number}.json"):
                sessions.read(tmp_path / "sessions" / f"9{number}.json")
        last = sessions.last()
        assert last is not None and last.turns[0].request == "Hi"

    def test_old_ones_go(self, tmp_path):
        (tmp_path / "sessions").mkdir()
        for number in range(KEPT_SESSIONS + 3):
            (tmp_path / "sessions" / f"{number}.json").write_text("{}")
        Sessions(tmp_path).prune()
        assert len(list((tmp_path / "sessions").iterdir())) == KEPT_SESSIONS


def test_markdown_is_rendered_where_the_terminal_can(context):
    (context.folder.root / "plan.md").write_text("# Plan\n\n- [x](http://evil.example) \x1b[2J\n")
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, highlight=False, markup=False, emoji=False)
    screen = Screen(console)
    screen.ascii = False
    assistant = Assistant(scripted(call("read_file", path="plan.md"), "Rest."), chosen_tools(context), context)
    assert asyncio.run(run_requests(assistant, ["Read"], screen)) == 0
    shown = output.getvalue()
    assert "# Plan" not in shown and "Plan" in shown
    assert "\x1b[2J" not in shown and "\x1b]8" not in shown
