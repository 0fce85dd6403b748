"""Registry files: what is read, what is written, and which line an error names."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen_agents.errors import RegistryError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.content import content_folder


def read(folder: Path, text: str) -> ToolRegistry:
    path = folder / "tools.yaml"
    path.write_text(text, encoding="utf-8")
    return ToolRegistry.from_yaml(path)


def one_tool(schema: str) -> str:
    return f"tools:\n- name: f\n  description: d\n  parameters: {{properties: {{a: {schema}}}}}\n"


UNSEEN = {
    "Image Super-Resolution",
    "Crop the Given Object",
    "Assess the Image Quality",
    "Recognize Face",
    "Detect Face",
    "Text Detection On Image",
    "Detection",
    "Generate 3D Asset From User Input Text",
}


class TestShippedFiles:
    def test_gpt4tools(self):
        seen = ToolRegistry.from_yaml(content_folder("tools") / "gpt4tools_seen.yaml")
        unseen = ToolRegistry.from_yaml(content_folder("tools") / "gpt4tools_unseen.yaml")
        assert len(seen) == 21
        assert set(unseen.names) == UNSEEN
        assert not set(seen.names) & UNSEEN
        assert seen.input_format == unseen.input_format == "csv"
        assert len(seen["Replace Something From The Photo"].argument_names) == 3
        for tool in (*seen, *unseen):
            assert 1 <= len(tool.argument_names) <= 3
            assert tool.required == set(tool.argument_names)

    def test_assistant(self):
        registry = ToolRegistry.from_yaml(content_folder("tools") / "assistant.yaml")
        assert registry.input_format == "json"
        assert {"calculator", "read_file", "today"} <= set(registry.names)
        assert len(registry) >= 30


class TestReading:
    def test_plain_scalars_are_those_of_yaml_1_2(self, tmp_path: Path):
        schema = "{enum: [yes, no, on, 1:30, 2024-01-01, 010, 0o7, 1_000, ~x, 3, -2.5, 1e3, true, null]}"
        values = read(tmp_path, one_tool(schema))["f"].parameters["properties"]["a"]["enum"]
        texts = ["yes", "no", "on", "1:30", "2024-01-01", "010", "0o7", "1_000", "~x"]
        assert values == [*texts, 3, -2.5, 1000.0, True, None]
        assert [type(value) for value in values] == [str] * 9 + [int, float, float, bool, type(None)]

    def test_anchors_and_merges(self, tmp_path: Path):
        text = (
            "tools:\n- name: f\n  description: d\n  parameters: &p {properties: {a: {type: string}}}\n"
            "- name: g\n  description: d\n  parameters: {<<: *p, required: [a]}\n"
        )
        registry = read(tmp_path, text)
        assert registry["g"].argument_names == ("a",)
        assert registry["g"].required == {"a"}

    def test_json_is_the_default_format(self, tmp_path: Path):
        assert read(tmp_path, "tools: []").input_format == "json"


class TestDamage:
    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("", 1, "the file is empty"),
            ("# only a comment\n", 1, "the file is empty"),
            ("- name: f\n", 1, "must be a mapping with the keys input_format, tools"),
            ("input_format: csv\n", 1, "'tools' is missing"),
            ("tools: 3\n", 1, "'tools' is no list"),
            ("input_format: xml\ntools: []\n", 1, "input_format is 'xml'; expected 'csv' or 'json'"),
            ("tools: []\ntool: []\n", 2, "unknown key 'tool'; expected input_format, tools"),
            ("tools:\n- search\n", 2, "a tool must be a mapping"),
            ("tools:\n- name: f\n", 2, "without 'description'"),
            ("tools:\n- name: f\n  description: d\n  args: {}\n", 4, "unknown key 'args'"),
            ("tools:\n- name: f\n  name: g\n  description: d\n", 3, "'name' twice"),
            ("tools:\n- name: 3\n  description: d\n", 2, "name of a tool must be text"),
            ("tools:\n- name: f\n  description: [d]\n", 3, "description of a tool must be text"),
            ("tools:\n- name: f\n  description: ''\n", 2, "'f': the description is empty"),
            ("tools:\n- name: f\n  description: d\n  parameters: []\n", 4, "must be a JSON Schema"),
            (
                "tools:\n- name: f\n  description: d\n  parameters:\n    type: array\n",
                2,
                "expected a JSON Schema of type",
            ),
            (
                "tools:\n- name: f\n  description: d\n  parameters:\n    properties:\n      a: {}\n      a: {}\n",
                7,
                "'a' stands here twice",
            ),
            ("tools:\n- name: f\n  description: d\n\n- name: f\n  description: e\n", 5, "two tools of this name"),
            ("tools:\n- name: f\n  description: 'd\n", 4, "not valid YAML"),
            ("tools:\n\t- name: f\n", 2, "not valid YAML"),
            ("tools:\n- &a\n  name: f\n  description: *b\n", 4, "undefined alias"),
            ("tools:\n- name: f\n  description: \x01\n", 3, "YAML can't hold the character"),
            ("tools: []\n---\ntools: []\n", 2, "not valid YAML"),
            ("tools:\n- name: f\n  description: d\n  parameters: {properties: &p {a: *p}}\n", 4, "holds itself"),
            ("tools:\n- name: f\n  description: d\n  parameters: !!python/none {}\n", 4, "not valid YAML"),
        ],
    )
    def test_error_names_file_line_and_expectation(self, tmp_path: Path, text: str, line: int, message: str):
        with pytest.raises(RegistryError) as error:
            read(tmp_path, text)
        assert str(error.value).startswith(f"{tmp_path / 'tools.yaml'}, line {line}: ")
        assert message in str(error.value)

    def test_csv_file_with_a_list_argument(self, tmp_path: Path):
        text = "input_format: csv\n" + one_tool("{type: array}")
        with pytest.raises(RegistryError, match=r"line 3: tool 'f': the argument 'a' is an object or a list"):
            read(tmp_path, text)

    def test_missing_file(self, tmp_path: Path):
        with pytest.raises(RegistryError, match=r"nothing\.yaml: can't be read: No such file"):
            ToolRegistry.from_yaml(tmp_path / "nothing.yaml")

    def test_not_utf8(self, tmp_path: Path):
        path = tmp_path / "tools.yaml"
        path.write_bytes(b"tools:\n- name: caf\xe9\n")
        with pytest.raises(RegistryError, match="line 2: not UTF-8"):
            ToolRegistry.from_yaml(path)

    def test_deep_nesting(self, tmp_path: Path):
        with pytest.raises(RegistryError, match="nested"):
            read(tmp_path, one_tool("[" * 2000 + "]" * 2000))

    @given(st.binary(max_size=200))
    def test_any_bytes_give_a_registry_or_a_registry_error(self, tmp_path_factory: pytest.TempPathFactory, data: bytes):
        path = tmp_path_factory.mktemp("any") / "tools.yaml"
        path.write_bytes(data)
        try:
            ToolRegistry.from_yaml(path)
        except RegistryError as error:
            assert str(path) in str(error)


class TestWriting:
    def test_round_trip(self, tmp_path: Path):
        schema = {
            "type": "object",
            "properties": {
                "b": {
                    "type": "string",
                    "enum": ["yes", "1:30", "", "null", "ü", "3", " a", "1e3", "007", "true", "~", "<<"],
                    "description": "two\nlines",
                },
                "a": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None, "examples": [1.5, True]},
            },
            "required": ["b"],
        }
        registry = ToolRegistry(
            [
                Tool(name="yes", description="It's: a #test\n- really", parameters=schema),
                Tool(name="1.5", description="d"),
            ]
        )
        path = tmp_path / "tools.yaml"
        registry.to_yaml(path)
        again = ToolRegistry.from_yaml(path)
        assert again == registry
        assert again["yes"].argument_names == ("b", "a")
        assert [entry.name for entry in tmp_path.iterdir()] == ["tools.yaml"]

    @pytest.mark.parametrize("line_break", ["\n", "\r\n", "\x85", "\u2028", "\u2029"])
    def test_line_breaks_round_trip(self, tmp_path: Path, line_break: str):
        text = f"two{line_break}lines"
        schema = {"properties": {text: {"type": "string", "examples": [line_break, f"{line_break}{text} "]}}}
        registry = ToolRegistry([Tool(name="f", description=text, parameters=schema)])
        registry.to_yaml(tmp_path / "tools.yaml")
        assert ToolRegistry.from_yaml(tmp_path / "tools.yaml") == registry

    @given(name=st.text(), description=st.text(), values=st.lists(st.text() | st.integers() | st.booleans()))
    def test_any_text_round_trips(self, tmp_path_factory, name: str, description: str, values: list):
        try:
            tool = Tool(name=name, description=description, parameters={"properties": {"a": {"examples": values}}})
        except RegistryError:
            return
        path = tmp_path_factory.mktemp("any") / "tools.yaml"
        registry = ToolRegistry([tool])
        registry.to_yaml(path)
        assert ToolRegistry.from_yaml(path) == registry
