"""The whole dialogue through prompt_toolkit's pipe input, on a scripted model: what a user types, and what they see."""

import asyncio
import io
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document as Line
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from loragen_agents.assistant.agent import Assistant
from loragen_agents.assistant.compare import Side
from loragen_agents.assistant.completion import AssistantCompleter
from loragen_agents.assistant.dialogue import Dialogue
from loragen_agents.assistant.loading import Loading
from loragen_agents.assistant.screen import Screen
from loragen_agents.assistant.sessions import Sessions
from loragen_agents.assistant.tools.catalog import chosen_tools
from loragen_agents.assistant.turns import Figures, Turn
from loragen_agents.errors import ModelLoadError
from tests.scripted_chat import NOW, ScriptedChatModel, call, scripted, tool_context

CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.fixture
def context(tmp_path):
    return tool_context(tmp_path)


def talk(
    context: Any,
    keyboard: PipeInput,
    model: Any,
    *lines: str,
    first: str | None = None,
    width: int = 80,
    **options: Any,
) -> tuple[str, Dialogue]:
    """Type `lines` and then Ctrl-D; give the screen and the dialogue."""
    screen = io.StringIO()
    keyboard.send_text("".join(line if line == CTRL_C else f"{line}\r" for line in lines) + CTRL_D)

    async def run() -> Dialogue:
        sessions = Sessions(context.store.path.parent)
        tools = chosen_tools(context)
        make = (lambda: model) if isinstance(model, ScriptedChatModel) else model
        assistant = Assistant(None, tools, context)
        console = Console(file=screen, width=width, highlight=False, markup=False, emoji=False)
        console_screen = Screen(console)
        console_screen.ascii, console_screen.mark, console_screen.dot = True, "*", "-"

        def compare(*_: Any) -> tuple[Side, Side]:
            return Side("tools in the weights", "today()", 30, 100, 400), Side(
                "in the prompt", "today()", 2300, 900, 1300
            )

        dialogue = Dialogue(
            assistant, list(tools), Loading(make), console_screen, sessions, sessions.new(), compare, **options
        )
        await dialogue.run(first)
        return dialogue

    dialogue = asyncio.run(run())
    return screen.getvalue(), dialogue


def test_a_turn_shows_its_steps_and_is_kept(context, keyboard):
    model = scripted(call("calculator", expression="17 * 23"), "It is 391.")
    shown, _dialogue = talk(context, keyboard, model, "What is 17 * 23?")
    lines = shown.splitlines()
    assert lines[0].startswith("  45 tools, files in ")
    lines = lines[lines.index("  /help says more, Ctrl-D leaves") :]
    assert lines[1] == "  * calculator  expression: 17 * 23"
    assert lines[2].startswith("    17 * 23 = 391  ") and lines[2].endswith(" ms")
    assert lines[3] == "  It is 391."
    assert lines[4].startswith("  31 prompt tokens, not 931 - first token 12 ms - turn ")
    kept = Sessions(context.store.path.parent).last()
    assert kept is not None and kept.turns[0].answer == "It is 391."


def test_tables_listings_and_markdown_are_shown_as_what_they_are(context, keyboard):
    model = scripted(call("list_files"), "Two.", call("read_file", path="plan.md"), "Rest.")
    shown, _ = talk(context, keyboard, model, "List", "Read plan.md")
    assert "    Name" in shown and "    shopping.txt" in shown and "2 rows, " in shown
    assert "    # Plan" in shown  # ASCII terminals get the source
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_what_tools_say_can_not_steer_the_terminal(context, keyboard):
    (context.folder.root / "plan.md").write_text("\x1b[2J\x1b]0;title\x07[bold red]hi[/] \u202e:smile: [x](http://e.x)")
    model = scripted(call("read_file", path="plan.md"), "\x1b[31mred [link=http://e.x]x[/link]")
    shown, _ = talk(context, keyboard, model, "Read it")
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "\\x1b[2J" in shown and "[bold red]hi[/]" in shown and ":smile:" in shown


@pytest.mark.parametrize(
    ("keys", "there", "seen"),
    [
        (["y"], False, "Deleted shopping.txt."),
        (["n"], True, "Not done, as you said no."),
        ([""], True, "Not done, as you said no."),
        (["s", "no"], True, "would delete shopping.txt (11 B) for good"),
        (["what?", "a"], False, "Deleted shopping.txt."),
    ],
)
def test_a_tool_that_changes_something_asks_first(context, keyboard, keys, there, seen):
    model = scripted(call("delete_file", path="shopping.txt"), "Done.")
    shown, _ = talk(context, keyboard, model, "Delete shopping.txt", *keys)
    assert (context.folder.root / "shopping.txt").exists() is there
    assert seen in shown


def test_a_no_is_said_once_and_the_time_to_think_is_not_the_turns(context, keyboard, monkeypatch):
    model = scripted(call("delete_file", path="shopping.txt"), "Done.")
    ask = Dialogue.ask

    async def slow(*arguments: Any) -> Any:
        await asyncio.sleep(2)
        return await ask(*arguments)

    monkeypatch.setattr(Dialogue, "ask", slow)
    started = time.perf_counter()
    shown, dialogue = talk(context, keyboard, model, "Delete shopping.txt", "n")
    assert shown.count("Not done") == 1 and "Error" not in shown
    turn = dialogue.assistant.turns[0]
    assert turn.calls[0].refused and 0 < turn.figures.turn_ms <= (time.perf_counter() - started - 2) * 1000


def test_ctrl_c_at_the_question_means_no(context, keyboard):
    model = scripted(call("delete_file", path="shopping.txt"), "Done.")
    shown, _ = talk(context, keyboard, model, "Delete shopping.txt", CTRL_C)
    assert (context.folder.root / "shopping.txt").exists() and "Not done" in shown


def test_ctrl_c_empties_the_line(context, keyboard):
    _shown, dialogue = talk(context, keyboard, scripted("Hi."), "half a li" + CTRL_C, "Hello")
    # The interrupted line ends with the return behind it, and is no request.
    assert [turn.request for turn in dialogue.assistant.turns] == ["Hello"]


def test_every_command_is_found_by_help_and_runs(context, keyboard):
    model = scripted(call("today"), "Wednesday.", "Again.")
    lines = ["What day is it?", "/help", "/why", "/compare", "/system Be brief.", "/system", "/save trip", "/undo"]
    lines += ["/load trip", "/load", "/retry", "/tools", "/reset", "/undo", "/nothing", "/quit"]
    shown, dialogue = talk(context, keyboard, model, *lines)
    for command in dialogue.commands.meanings():
        assert command in shown
    assert "Step 1: some tool 90%, an answer 10%" in shown and "calculator | 80%" in shown
    assert "tools in the weights" in shown and "2,300" in shown
    assert "Be brief." in shown
    assert "Taken back: What day is it?" in shown
    assert "Loaded trip, 1 turns." in shown and "Kept are: trip" in shown
    assert "Again." in shown
    assert "A new conversation." in shown and "There is no turn yet." in shown
    assert "There is no command /nothing; /help lists them." in shown
    assert dialogue.assistant.turns == []


def test_tools_are_switched(context, keyboard):
    model = scripted("Hi.")
    lines = ["/tools off images system", "/tools on battery", "/tools off", "/tools off pictures", "Hello"]
    shown, _dialogue = talk(context, keyboard, model, *lines)
    assert "34 of 45 tools are on." in shown and "35 of 45 tools are on." in shown
    assert "pictures is no tool or group; the groups are maths," in shown
    assert "battery" in model.bound[-1] and "disk_space" not in model.bound[-1]


def test_a_model_that_can_not_be_loaded_is_an_error_of_the_turn(context, keyboard):
    def fail() -> Any:
        raise ModelLoadError("no model here")

    shown, dialogue = talk(context, keyboard, fail, "Hello")
    assert "The model can't be loaded: no model here" in shown and dialogue.assistant.turns == []


def test_timers_ring(context, keyboard):
    context.store.add("timer", "eggs", NOW, NOW - timedelta(seconds=1))
    shown, _ = talk(context, keyboard, scripted("Hi."), "Hello")
    assert "Timer: eggs" in shown


def test_a_scripted_request_comes_first(context, keyboard):
    shown, _dialogue = talk(context, keyboard, scripted("Hi."), first="Hello")
    assert "  > Hello\n  Hi.\n" in shown


def test_marks_in_front_of_files_are_for_the_editor_alone(context, keyboard):
    model = scripted("Fine.")
    talk(context, keyboard, model, "Read @plan.md and ask anna@example.com about @nothing")
    assert model.seen[0][-1].text == "Read plan.md and ask anna@example.com about @nothing"


def test_lines_are_kept_between_sessions(context, keyboard, tmp_path):
    talk(context, keyboard, scripted("Hi."), "Hello there", history_file=tmp_path / "new" / "history")
    assert "+Hello there" in (tmp_path / "new" / "history").read_text()


@pytest.mark.parametrize("width", [80, 120])
def test_long_answers_break_at_words(context, keyboard, width):
    answer = "Every word of this answer stands whole on its line, however wide the terminal may be. " * 3
    shown, _ = talk(context, keyboard, scripted(f"{answer}\n\n- one\n- two"), "Go on", width=width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width and "  - one" in lines
    assert answer.strip() in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_questions_and_figures_break_between_words(width):
    written = io.StringIO()
    screen = Screen(Console(width=width, file=written))
    text = "Run Edge Detection On Image? [y]es, [n]o, [a]lways, [s]how what it would do:"
    question = screen.question(text).split("\n")
    assert " ".join(question).split() == text.split()
    assert all(line.startswith("    ") and len(line) < width - 6 for line in question) and question[-1].endswith(": ")
    figures = Figures(prompt_tokens=131, definition_tokens=1700, first_token_ms=112, turn_ms=11348)
    screen.turn_ends(Turn("Hi", answer="Hello", figures=figures))
    shown = written.getvalue().splitlines()
    assert all(len(line) <= width for line in shown) and len(shown) == (2 if width < 80 else 1)
    assert "turn 11.3 s" in shown[-1] and any("first token 112 ms" in line for line in shown)


def test_a_long_argument_leaves_room_for_its_name(context, keyboard):
    path = "folder/" * 20
    shown, _ = talk(context, keyboard, scripted(call("read_file", path=path), "No."), "Read it", width=60)
    (line,) = [line for line in shown.splitlines() if "* read_file" in line]
    assert "  path: folder/" in line and line.endswith("...")


def test_completion(context):
    (context.folder.root / "letters").mkdir()
    (context.folder.root / "letters" / "anna.txt").write_text("")
    completer = AssistantCompleter({"/tools": "x", "/try": "y"}, {"/tools": lambda: ["on", "files"]}, context.folder)

    def complete(text: str) -> list[str]:
        return [one.text for one in completer.get_completions(Line(text), CompleteEvent())]

    assert complete("/t") == ["/tools", "/try"]
    assert complete("/tools f") == ["files"] and complete("/tools ") == ["on", "files"]
    assert complete("read @") == ["letters/", "plan.md", "shopping.txt"]
    assert complete("read @letters/a") == ["anna.txt"]
    assert complete("@../") == [] and complete("read") == [] and complete("") == []


def test_files_of_the_dialogue_stay_inside(context, tmp_path):
    (context.folder.root / "out").symlink_to(tmp_path)
    completer = AssistantCompleter({}, {}, context.folder)
    assert [one.text for one in completer.get_completions(Line("@o"), CompleteEvent())] == []
    assert isinstance(tmp_path, Path)
