"""The assistant's tools, each by what it does; none needs a model."""

import inspect
import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from PIL import Image

from loragen_agents.assistant.results import MODEL_CHARACTERS, Document, Result, Table
from loragen_agents.assistant.tools import maths
from loragen_agents.assistant.tools.catalog import ASK_FIRST, GROUPS, all_tools, chosen_tools, registry
from loragen_agents.assistant.tools.context import Context, Folder, ToolError
from loragen_agents.assistant.tools.moments import duration, later, moment, time_zone
from loragen_agents.assistant.tools.store import Store
from loragen_agents.errors import RegistryError
from loragen_agents.registry import ToolRegistry

# A Wednesday.
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=ZoneInfo("Europe/Berlin"))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    root = tmp_path / "root"
    root.mkdir()
    (root / "shopping.txt").write_text("milk\nbread\n")
    (root / "letters").mkdir()
    (root / "letters" / "anna.md").write_text("# To Anna\n\nThe pasta was good.\n")
    (root / "budget.csv").write_text('Item,Price,Paid\nRent,"1,200.50",yes\nFood,300,no\nFun,,no\n')
    (root / "config.json").write_text('{"server": {"port": 8080, "hosts": ["a", "b"]}}')
    Image.new("RGB", (40, 20), "red").save(root / "photo.png")
    return Context(Folder(root), Store(tmp_path / "store.sqlite"), lambda: NOW)


def run(context: Context, name: str, /, **arguments: object) -> Result:
    (tool,) = chosen_tools(context, [name])
    message = tool.invoke({"type": "tool_call", "id": "1", "name": name, "args": arguments})
    assert message.status == "success"
    result = message.artifact
    assert isinstance(result, Result) and message.content == result.for_model
    return result


class TestCatalog:
    def test_functions_and_registry_file_agree(self, context):
        described = {tool.name: tool for tool in registry()}
        written = {name: function for group in GROUPS.values() for name, function in group(context).items()}
        assert written.keys() == described.keys()
        assert len(written) >= 30
        for name, function in written.items():
            parameters = inspect.signature(function).parameters
            assert set(parameters) == set(described[name].argument_names), name
            needed = {one for one, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
            assert needed == described[name].required, name
        assert described.keys() >= ASK_FIRST

    def test_langchain_tools_are_described_as_in_the_file(self, context):
        tools = chosen_tools(context)
        assert ToolRegistry.from_tools(tools).fingerprint == registry().fingerprint

    def test_groups_and_names(self, context):
        groups = all_tools(context)
        assert {tool.name for tool in chosen_tools(context, ["files", "today"])} == {
            *(tool.name for tool in groups["files"]),
            "today",
        }
        with pytest.raises(RegistryError, match="no tool or group 'fils'; the groups are maths"):
            chosen_tools(context, ["fils"])

    def test_arguments_that_do_not_fit_are_refused(self, context):
        (tool,) = chosen_tools(context, ["convert_units"])
        with pytest.raises(ToolError, match="value"):
            tool.invoke({"value": "five", "from_unit": "miles", "to_unit": "km"})
        with pytest.raises(ToolError, match="required"):
            tool.invoke({"value": 5, "from_unit": "miles"})

    def test_a_long_result_is_cut_for_the_model_alone(self, context):
        (context.folder.root / "long.txt").write_text("word " * 2000)
        result = run(context, "read_file", path="long.txt")
        assert len(result.for_model) < MODEL_CHARACTERS + 100 < len(result.text)
        assert isinstance(result.shown, Document) and len(result.shown.text) > 9000


NO_VALUE = (
    *("", "1 / 0", "9 ^ 9 ^ 9 ^ 9", "(1 + 2", "2 +", "apples + 2", "__import__('os')", "sqrt of -1", "(" * 400),
    *("1e999", "201!", "(-8) ^ 0.5", "1 2", "9" * 600),
)


class TestArithmetic:
    @pytest.mark.parametrize(
        ("expression", "value"),
        [
            ("17 * 23", 391),
            ("15% of 240", 36),
            ("sqrt of 144", 12),
            ("the square root of 2 squared", 2),
            ("3.5 times 12 plus 8", 50),
            ("(5+3)*12", 96),
            ("2 + 3 * 4 ^ 2", 50),
            ("-2 ^ 2", -4),
            ("2 ** -1", 0.5),
            ("200 plus 10%", 220),
            ("80 - 25 percent", 60),
            ("17 % 5", 2),
            ("17 mod 5", 2),
            ("100 divided by 8", 12.5),
            ("12 x 12", 144),
            ("3(4 + 1)", 15),
            ("1,250,000 / 4", 312500),
            ("half of 90", 45),
            ("What is 7 minus twelve?", -5),
            ("5!", 120),
            ("2 to the power of 10", 1024),
            ("0.1 + 0.2", 0.3),
            ("$19.99 * 3", 59.97),
            ("cube root of 27", 3),
            ("pi", 3.14159265358979),
        ],
    )
    def test_is_read_as_people_write_it(self, expression, value):
        assert maths.evaluate(expression) == pytest.approx(value)

    def test_is_written_without_noise(self):
        assert maths.calculator("0.1 + 0.2 =").text == "0.1 + 0.2 = 0.3"
        assert maths.calculator("6 / 3").text == "6 / 3 = 2"

    @pytest.mark.parametrize("expression", NO_VALUE)
    def test_refuses_what_has_no_value(self, expression):
        with pytest.raises(ToolError):
            maths.evaluate(expression)


class TestUnits:
    @pytest.mark.parametrize(
        ("value", "from_unit", "to_unit", "said"),
        [
            (5, "miles", "kilometres", "8.04672"),
            (100, "F", "C", "37.7778"),
            (20, "degrees Celsius", "fahrenheit", "68"),
            (3, "ounces", "grams", "85.0486"),
            (2, "Cups", "millilitres", "473.176"),
            (60, "mph", "km/h", "96.5606"),
            (10, "square feet", "square metres", "0.92903"),
            (100, "kilometres per hour", "miles per hour", "62.1371"),
            (1, "GB", "MB", "1000"),
            (90, "minutes", "hours", "1.5"),
            (6, "feet", "cm", "182.88"),
            (12, "stone", "kg", "76.2035"),
        ],
    )
    def test_convert(self, context, value, from_unit, to_unit, said):
        result = run(context, "convert_units", value=value, from_unit=from_unit, to_unit=to_unit)
        assert result.text == f"{value} {from_unit} = {said} {to_unit}"

    @pytest.mark.parametrize(("one", "other"), [("miles", "grams"), ("gats", "grams"), ("", "grams"), ("m;x", "m")])
    def test_refuse(self, one, other):
        with pytest.raises(ToolError):
            maths.convert_units(1, one, other)


class TestMoments:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("next Friday", "2026-11-27 00:00"),
            ("3 May", "2027-05-03 00:00"),
            ("on the 3rd of May 2025", "2025-05-03 00:00"),
            ("tomorrow at 5pm", "2026-11-26 17:00"),
            ("tomorrow at half past seven", "2026-11-26 07:30"),
            ("quarter to nine", "2026-11-26 08:45"),
            ("in two weeks", "2026-12-09 00:00"),
            ("in 20 minutes", "2026-11-25 12:20"),
            ("Monday next week", "2026-11-30 00:00"),
            ("christmas", "2026-12-25 00:00"),
            ("New Year's Eve at noon", "2026-12-31 12:00"),
            ("end of the month", "2026-11-30 00:00"),
            ("the 5th", "2026-12-05 00:00"),
            ("tomorrow morning", "2026-11-26 09:00"),
            ("2026-03-01", "2026-03-01 00:00"),
            ("last monday", "2026-11-23 00:00"),
            ("today", "2026-11-25 00:00"),
        ],
    )
    def test_are_read_in_peoples_words(self, text, expected):
        assert f"{moment(text, NOW):%Y-%m-%d %H:%M}" == expected

    @pytest.mark.parametrize("text", ["", "soonish", "31 February 2026", "9" * 40, "🍕"])
    def test_refuse(self, text):
        with pytest.raises(ToolError):
            moment(text, NOW)

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("10 minutes", 600),
            ("an hour and a half", 5400),
            ("1h 30m", 5400),
            ("half an hour", 1800),
            ("1:30", 90),
            ("twenty-five minutes", 1500),
            ("45 sec", 45),
            ("2 hours", 7200),
        ],
    )
    def test_durations(self, text, seconds):
        assert duration(text) == timedelta(seconds=seconds)

    @pytest.mark.parametrize("text", ["", "soon", "0 minutes", "5 years"])
    def test_durations_refused(self, text):
        with pytest.raises(ToolError):
            duration(text)

    def test_later(self):
        assert f"{later('3 weeks', NOW):%Y-%m-%d}" == "2026-12-16"
        assert f"{later('2 months before', NOW):%Y-%m-%d}" == "2026-09-25"
        with pytest.raises(ToolError):
            later("99999999 years", NOW)

    @pytest.mark.parametrize(
        ("place", "zone"),
        [
            ("Tokyo", "Asia/Tokyo"),
            ("new york", "America/New_York"),
            ("Mumbai", "Asia/Kolkata"),
            ("Europe/Paris", "Europe/Paris"),
            ("Sydney, Australia", "Australia/Sydney"),
        ],
    )
    def test_time_zones(self, place, zone):
        assert time_zone(place).key == zone

    def test_dates_tools(self, context):
        assert run(context, "today").text == "Today is Wednesday, 25 November 2026."
        assert "In Tokyo it is 20:00" in run(context, "current_time", place="Tokyo").text
        assert run(context, "current_time").text.startswith("It is 12:00")
        assert run(context, "day_of_week", date="3 May 2026").text == "3 May 2026 is a Sunday."
        assert run(context, "days_between", end="25 December").text.startswith("It is 30 days from Wednesday")
        assert run(context, "days_between", start="2026-03-01", end="2026-02-01").text.startswith("It is 28 days back")
        assert run(context, "date_after", interval="10 days").text.endswith("is Saturday, 5 December 2026.")


class TestFiles:
    def test_list_find_search_read(self, context):
        listing = run(context, "list_files").shown
        assert isinstance(listing, Table)
        assert [row[0] for row in listing.rows] == [
            "letters/",
            "budget.csv",
            "config.json",
            "photo.png",
            "shopping.txt",
        ]
        found = run(context, "find_files", name="*.md")
        assert isinstance(found.shown, Table) and found.shown.rows[0][0] == "letters/anna.md"
        assert "budget.csv" in run(context, "find_files", name="budget").text
        lines = run(context, "search_files", text="PASTA")
        assert isinstance(lines.shown, Table) and lines.shown.rows == (("letters/anna.md", 3, "The pasta was good."),)
        assert lines.outside
        read = run(context, "read_file", path="letters/anna.md")
        assert isinstance(read.shown, Document) and read.shown.markdown and read.outside
        assert run(context, "list_files", folder="letters").text.startswith("1 file in letters:")

    def test_write_append_copy_move_delete(self, context):
        root = context.folder.root
        run(context, "write_file", path="new.txt", text="one")
        run(context, "append_to_file", path="new.txt", text="two")
        assert (root / "new.txt").read_text() == "one\ntwo\n"
        run(context, "copy_file", source="new.txt", destination="letters")
        run(context, "move_file", source="new.txt", destination="old.txt")
        assert not (root / "new.txt").exists() and (root / "letters" / "new.txt").read_text() == "one\ntwo\n"
        run(context, "move_file", source="old.txt", destination="archive/")
        assert (root / "archive" / "old.txt").exists()
        run(context, "delete_file", path="archive/old.txt")
        assert not (root / "archive" / "old.txt").exists()

    def test_nothing_is_overwritten_by_copies_and_moves(self, context):
        for name in ("copy_file", "move_file"):
            with pytest.raises(ToolError, match="there already"):
                chosen_tools(context, [name])[0].invoke({"source": "shopping.txt", "destination": "config.json"})
        assert "server" in (context.folder.root / "config.json").read_text()

    def test_a_missing_file_names_those_that_may_be_meant(self, context):
        with pytest.raises(ToolError, match=r"no file anna\.md; there is letters/anna\.md"):
            context.folder.file("anna.md")
        with pytest.raises(ToolError, match=r"there is shopping\.txt"):
            context.folder.file("Shopping")

    def test_odd_contents(self, context):
        root = context.folder.root
        (root / "binary").write_bytes(b"\0\1")
        (root / "latin").write_bytes("caf\xe9".encode("latin-1"))
        (root / "empty").write_text("")
        (root / "large").write_bytes(b"a" * 1_000_001)
        with pytest.raises(ToolError, match="no text"):
            run(context, "read_file", path="binary")
        with pytest.raises(ToolError, match="larger"):
            run(context, "read_file", path="large")
        assert run(context, "read_file", path="latin").text == "caf\ufffd"
        assert run(context, "read_file", path="empty").text == "(the file is empty)"


class TestBorder:
    """Nothing outside the folder is read or written, whatever the name looks like."""

    OUTSIDE = (
        "..",
        "../secret.txt",
        "letters/../../secret.txt",
        "/etc/passwd",
        "//etc/passwd",
        "./../secret.txt",
        "escape/secret.txt",
        "escape",
        "secret-link",
        "link-to-link",
        "letters/../..",
    )

    @pytest.fixture
    def hostile(self, context, tmp_path) -> Context:
        (tmp_path / "secret.txt").write_text("secret")
        root = context.folder.root
        (root / "escape").symlink_to(tmp_path)
        (root / "secret-link").symlink_to(tmp_path / "secret.txt")
        (root / "link-to-link").symlink_to(root / "secret-link")
        (root / "loop").symlink_to(root / "loop")
        (root / "dangling").symlink_to(tmp_path / "not-there-yet.txt")
        return context

    @pytest.mark.parametrize("path", [*OUTSIDE, "dangling", "~/.ssh/../../../secret.txt", "a\0b", "a\nb"])
    def test_every_tool_that_takes_a_path(self, hostile, tmp_path, path):
        calls = [
            ("read_file", {"path": path}),
            ("list_files", {"folder": path}),
            ("search_files", {"text": "secret", "folder": path}),
            ("write_file", {"path": path, "text": "x"}),
            ("append_to_file", {"path": path, "text": "x"}),
            ("copy_file", {"source": path, "destination": "copy.txt"}),
            ("copy_file", {"source": "shopping.txt", "destination": path}),
            ("move_file", {"source": path, "destination": "moved.txt"}),
            ("move_file", {"source": "shopping.txt", "destination": path}),
            ("delete_file", {"path": path}),
            ("text_statistics", {"path": path}),
            ("look_up_rows", {"path": path, "column": "a", "value": "b"}),
            ("look_up_json", {"path": path, "key": "a"}),
            ("image_size", {"image_path": path}),
        ]
        before = sorted(os.listdir(tmp_path))
        for name, arguments in calls:
            (tool,) = chosen_tools(hostile, [name])
            with pytest.raises(ToolError):
                tool.invoke(arguments)
        assert (tmp_path / "secret.txt").read_text() == "secret"
        assert sorted(os.listdir(tmp_path)) == before
        assert (hostile.folder.root / "shopping.txt").exists()

    def test_searches_do_not_follow_links(self, hostile):
        assert run(hostile, "find_files", name="secret.txt").text == "No file is called secret.txt."
        assert run(hostile, "search_files", text="secret").text.startswith("No file")
        with pytest.raises(ToolError):
            hostile.folder.file("loop")

    @pytest.mark.parametrize("name", ["ünï cödé.txt", "-rf", "a b.txt", "~", "$HOME", "%2e%2e", "...", "名.txt", "a'b"])
    def test_odd_names_inside_are_just_names(self, context, name):
        run(context, "write_file", path=name, text="x")
        assert (context.folder.root / name).read_text() == "x\n"
        assert run(context, "read_file", path=name).text == "x"
        run(context, "delete_file", path=name)
        assert not (context.folder.root / name).exists()

    def test_links_inside_the_folder_work(self, context):
        (context.folder.root / "again.txt").symlink_to(context.folder.root / "shopping.txt")
        assert run(context, "read_file", path="again.txt").text == "milk\nbread"


class TestStore:
    def test_notes(self, context):
        assert run(context, "take_note", text="Anna's birthday is on 3 May").text.startswith("Noted as number 1")
        run(context, "take_note", text="the wifi password is tulip")
        assert "tulip" in run(context, "search_notes", text="wifi").text
        assert run(context, "search_notes", text="zebra").text == "No note says anything about zebra."
        assert (
            run(context, "delete_note", note="the note about Anna").text
            == "Deleted the note: Anna's birthday is on 3 May"
        )
        listed = run(context, "list_notes").shown
        assert isinstance(listed, Table) and listed.rows == ((2, "the wifi password is tulip"),)
        with pytest.raises(ToolError, match=r"no notes match 'cars': 2\. the wifi"):
            run(context, "delete_note", note="cars")

    def test_tasks(self, context):
        for task in ("buy milk", "buy bread", "call the bank"):
            run(context, "add_task", task=task)
        with pytest.raises(ToolError, match="several tasks match 'buy'"):
            run(context, "complete_task", task="buy")
        assert run(context, "complete_task", task="milk").text == "Done: buy milk (2 left)"
        assert run(context, "delete_task", task="3").text == "Removed from the list: call the bank"
        assert run(context, "list_tasks").text == "1 task:\n2, buy bread"
        with pytest.raises(ToolError, match="empty"):
            run(context, "add_task", task="  ")

    def test_reminders_and_timers_ring_once(self, context):
        assert "27 November 2026, 09:00" in run(context, "add_reminder", text="call Anna", when="next Friday").text
        assert "12:20: tea" in run(context, "add_reminder", text="tea", when="in 20 minutes").text
        run(context, "start_timer", duration="5 minutes", label="eggs")
        with pytest.raises(ToolError, match="is over"):
            run(context, "add_reminder", text="x", when="2026-01-01")
        assert [entry.text for entry in context.store.due(NOW)] == []
        assert [entry.text for entry in context.store.due(NOW + timedelta(minutes=30))] == ["eggs", "tea"]
        assert context.store.due(NOW + timedelta(minutes=31)) == []
        assert run(context, "list_timers").text == "No timer is running."
        run(context, "delete_reminder", reminder="Anna")
        assert run(context, "list_reminders").text == "There are no reminders."

    def test_a_timer_is_stopped_without_a_name_where_it_is_the_only_one(self, context):
        run(context, "start_timer", duration="1:30")
        assert run(context, "cancel_timer").text == "Stopped timer 1 (timer)."

    def test_what_is_kept_is_there_for_the_next_one(self, context):
        run(context, "take_note", text="x'); DROP TABLE entries; --")
        assert [entry.text for entry in Store(context.store.path).open_entries("note")] == [
            "x'); DROP TABLE entries; --"
        ]

    def test_a_damaged_file_is_an_error_that_names_it(self, tmp_path):
        (tmp_path / "store.sqlite").write_text("no database" * 100)
        with pytest.raises(ToolError, match=r"store\.sqlite"):
            Store(tmp_path / "store.sqlite")


class TestData:
    def test_text_statistics(self, context):
        assert run(context, "text_statistics", path="shopping.txt").text == (
            "shopping.txt has 2 words, 2 lines, 10 characters, 1 paragraphs."
        )

    def test_tables(self, context):
        rows = run(context, "look_up_rows", path="budget.csv", column="paid", value="No")
        assert rows.shown == Table(("Item", "Price", "Paid"), (("Food", "300", "no"), ("Fun", "", "no")))
        total = run(context, "summarize_column", path="budget.csv", column="prices", operation="sum")
        assert total.text == "The sum of Price is 1500.5 (2 numbers, 1 without one)."
        assert "1200.5" in run(context, "summarize_column", path="budget.csv", column="Price", operation="maximum").text
        assert run(context, "summarize_column", path="budget.csv", column="Item", operation="count").text.startswith(
            "3 of 3"
        )
        with pytest.raises(ToolError, match="no column 'cost'; there are Item, Price, Paid"):
            run(context, "summarize_column", path="budget.csv", column="cost", operation="sum")
        with pytest.raises(ToolError, match="no numbers"):
            run(context, "summarize_column", path="budget.csv", column="Item", operation="sum")

    def test_json(self, context):
        assert run(context, "look_up_json", path="config.json", key="server.port").text == "server.port is 8080"
        assert run(context, "look_up_json", path="config.json", key="server.hosts[1]").text == "server.hosts[1] is b"
        with pytest.raises(ToolError, match="no key 'name'"):
            run(context, "look_up_json", path="config.json", key="name")
        with pytest.raises(ToolError, match="not JSON"):
            run(context, "look_up_json", path="shopping.txt", key="name")


class TestImages:
    def test_size(self, context):
        assert run(context, "image_size", image_path="photo.png").text == "photo.png is 40 x 20 pixels (PNG)."

    @pytest.mark.parametrize(
        ("name", "arguments", "file", "size"),
        [
            ("crop_image", {"left": 10, "top": 5, "width": 100, "height": 10}, "photo-cropped.png", (30, 10)),
            ("resize_image", {"width": 20}, "photo-resized.png", (20, 10)),
            ("resize_image", {"width": 20, "height": 20}, "photo-resized.png", (20, 20)),
            ("rotate_image", {"degrees": 90}, "photo-rotated.png", (20, 40)),
            ("convert_image", {"format": "jpeg"}, "photo.jpg", (40, 20)),
            ("grey_image", {}, "photo-grey.png", (40, 20)),
            ("Edge Detection On Image", {}, "photo-edges.png", (38, 18)),
        ],
    )
    def test_changed_pictures_are_new_files(self, context, name, arguments, file, size):
        before = (context.folder.root / "photo.png").read_bytes()
        for wanted in (file, file.replace(".", "-2.")):
            run(context, name, image_path="photo.png", **arguments)
            with Image.open(context.folder.root / wanted) as image:
                assert image.size == size
        assert (context.folder.root / "photo.png").read_bytes() == before

    def test_rotation_is_clockwise(self, context):
        image = Image.new("RGB", (2, 1))
        image.putpixel((0, 0), (255, 0, 0))
        image.save(context.folder.root / "two.png")
        run(context, "rotate_image", image_path="two.png", degrees=90)
        with Image.open(context.folder.root / "two-rotated.png") as turned:
            assert turned.getpixel((0, 0)) == (255, 0, 0)

    def test_what_is_no_picture_is_an_error(self, context):
        (context.folder.root / "cut.png").write_bytes((context.folder.root / "photo.png").read_bytes()[:60])
        for name in ("shopping.txt", "cut.png", "missing.png"):
            with pytest.raises(ToolError):
                run(context, "grey_image", image_path=name)
        with pytest.raises(ToolError, match="outside the picture"):
            run(context, "crop_image", image_path="photo.png", left=50, top=0, width=5, height=5)


def test_system(context):
    for name in ("disk_space", "memory_usage"):
        assert "is free" in run(context, name).text
    processes = run(context, "list_processes").shown
    assert isinstance(processes, Table) and 1 <= len(processes.rows) <= 10
    assert "battery" in run(context, "battery").text


def test_results_are_plain_json_for_scripts(context):
    json.dumps([run(context, "list_files").text, run(context, "disk_space").text])
