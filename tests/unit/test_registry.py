"""Tools of every make, what a registry refuses, and its fingerprint."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain.tools import InjectedState, ToolRuntime
from langchain_core.tools import InjectedToolArg, StructuredTool, tool
from langchain_core.tools import Tool as PlainTool
from pydantic import BaseModel, Field

from loragen_agents.errors import RegistryError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.support.content import content_folder

TEXT = {"type": "string"}


def make(name: str = "search", description: str = "Search.", **properties: Any) -> Tool:
    return Tool(name=name, description=description, parameters={"type": "object", "properties": properties})


@tool(parse_docstring=True)
def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    Args:
        city: name of the town
    """
    return ""


def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


class Point(BaseModel):
    """A point."""

    x: int = Field(description="to the right")
    y: int = 0


class Move(BaseModel):
    """Move something."""

    target: Point
    path: list[Point] = []


class TestSources:
    def test_langchain_tool(self):
        read = ToolRegistry.from_tools([weather])["weather"]
        assert read.description == "Tell the weather."
        assert read.argument_names == ("city", "days", "unit")
        assert read.required == {"city"}
        assert read.parameters["properties"]["city"] == {"type": "string", "description": "name of the town"}
        assert read.parameters["properties"]["unit"]["enum"] == ["C", "F"]

    def test_function(self):
        read = ToolRegistry.from_tools([add])["add"]
        assert read.description == "Add two numbers."
        assert read.parameters["properties"] == {"a": {"type": "number"}, "b": {"type": "number"}}
        assert read.required == {"a", "b"}

    def test_pydantic_class(self):
        read = ToolRegistry.from_tools([Point])["Point"]
        assert read.description == "A point."
        assert read.parameters["properties"]["x"] == {"type": "integer", "description": "to the right"}

    def test_nested_pydantic_classes_need_no_resolver(self):
        parameters = ToolRegistry.from_tools([Move])["Move"].parameters
        assert parameters["properties"]["target"]["properties"]["x"]["type"] == "integer"
        assert parameters["properties"]["path"]["items"]["properties"]["y"]["type"] == "integer"
        assert "$defs" not in parameters

    def test_typed_dict(self):
        class Lookup(TypedDict):
            """Look a word up."""

            word: str

        assert ToolRegistry.from_tools([Lookup])["Lookup"].argument_names == ("word",)

    def test_single_input_tool(self):
        read = ToolRegistry.from_tools([PlainTool(name="ask", description="Ask.", func=str)])["ask"]
        assert len(read.argument_names) == 1
        assert read.types_of(read.argument_names[0]) == {"string"}

    @pytest.mark.parametrize(
        "source",
        [
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": {"properties": {"a": TEXT}}},
            },
            {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": TEXT}}},
            {"type": "function", "name": "f", "description": "d", "parameters": {"properties": {"a": TEXT}}},
            {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": TEXT}}},
            {"name": "f", "description": "d", "inputSchema": {"type": "object", "properties": {"a": TEXT}}},
            {"toolSpec": {"name": "f", "description": "d", "inputSchema": {"json": {"properties": {"a": TEXT}}}}},
            {"title": "f", "description": "d", "type": "object", "properties": {"a": TEXT}},
        ],
        ids=["openai", "bare", "responses", "anthropic", "mcp", "bedrock", "json-schema"],
    )
    def test_dicts_of_all_makes_are_the_same_tool(self, source: dict[str, Any]):
        assert ToolRegistry.from_tools([source]) == ToolRegistry([make("f", "d", a=TEXT)])

    def test_dict_without_parameters_takes_no_arguments(self):
        read = ToolRegistry.from_tools([{"name": "today", "description": "The date."}])["today"]
        assert read.parameters == {"type": "object", "properties": {}}
        assert read.argument_names == ()

    def test_openai_dicts_round_trip(self):
        registry = ToolRegistry.from_tools([weather, add, Move])
        assert ToolRegistry.from_tools(registry.to_openai()) == registry

    def test_injected_arguments_are_left_out(self):
        @tool
        def save(text: str, state: Annotated[dict, InjectedState], runtime: ToolRuntime) -> str:
            """Save."""
            return ""

        def note(text: str, runtime: ToolRuntime, user: Annotated[str, InjectedToolArg]) -> str:
            """Note."""
            return ""

        class Store(BaseModel):
            """Store."""

            text: str
            user: Annotated[str, InjectedToolArg]

        for read in ToolRegistry.from_tools([save, note, Store]):
            assert read.argument_names == ("text",)
            assert read.required == {"text"}

    @pytest.mark.parametrize("source", [3, "search", object(), None], ids=["number", "text", "object", "None"])
    def test_what_is_no_tool_is_named(self, source: Any):
        with pytest.raises(RegistryError, match=r"not a tool; expected a LangChain tool"):
            ToolRegistry.from_tools([source])

    def test_dict_of_no_known_make(self):
        with pytest.raises(RegistryError, match=r"'foo'.*expected 'name'"):
            ToolRegistry.from_tools([{"foo": 1}])

    def test_tool_that_the_provider_runs(self):
        with pytest.raises(RegistryError, match=r"'web_search'.*its provider runs it"):
            ToolRegistry.from_tools([{"type": "web_search_20250305", "name": "web_search"}])

    def test_function_without_description_is_named(self):
        def mystery(a: int) -> int:
            return a

        with pytest.raises(RegistryError, match="mystery"):
            ToolRegistry.from_tools([mystery])

    def test_tool_that_langchain_cant_describe_is_named(self):
        class Opaque:
            pass

        def odd(a: Opaque) -> None:
            """Odd."""

        with pytest.raises(RegistryError, match="odd"):
            ToolRegistry.from_tools([odd])


class TestRefusals:
    def test_two_tools_of_one_name(self):
        with pytest.raises(RegistryError, match=r"'search'.*two tools of this name"):
            ToolRegistry([make(), make(description="Another.")])

    @pytest.mark.parametrize("description", ["", "  \n"])
    def test_empty_description(self, description: str):
        with pytest.raises(RegistryError, match=r"'search'.*description is empty"):
            make(description=description)

    @pytest.mark.parametrize(
        "parameters",
        [{"type": "array", "items": TEXT}, {"type": "string"}, {"type": ["object", "null"]}, []],
        ids=repr,
    )
    def test_parameters_that_are_no_object(self, parameters: Any):
        with pytest.raises(RegistryError, match=r"'search'"):
            Tool(name="search", description="d", parameters=parameters)

    @pytest.mark.parametrize(
        "name",
        ["", "a\nb", "a, b", " a", "a ", "a: b", "a\tb", "a\u2028b", "a\x00", "[a]", "a\r"],
        ids=repr,
    )
    def test_names_that_break_the_line_format(self, name: str):
        with pytest.raises(RegistryError, match="name") as error:
            make(name)
        assert repr(name) in str(error.value)

    @pytest.mark.parametrize(
        "name", ["Image Super-Resolution", "get_weather", "a.b/c", "Wetter für heute", "3D", "<x>"]
    )
    def test_names_that_dont(self, name: str):
        assert make(name).name == name

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "strng"},
            {"type": "string", "pattern": "("},
            {"minimum": "3"},
            {"enum": "ab"},
        ],
        ids=repr,
    )
    def test_invalid_schema_is_named(self, schema: dict[str, Any]):
        with pytest.raises(RegistryError, match=r"'search'.*not a valid JSON Schema.*properties/a"):
            make(a=schema)

    def test_values_that_json_lacks(self):
        for value in (float("nan"), {1, 2}, {1: "a"}):
            with pytest.raises(RegistryError, match="'search'"):
                make(a={"default": value})

    def test_required_argument_without_a_schema(self):
        with pytest.raises(RegistryError, match=r"'search'.*'b' is required but not a property"):
            Tool(name="search", description="d", parameters={"properties": {"a": TEXT}, "required": ["b"]})

    def test_reference_that_leads_nowhere(self):
        with pytest.raises(RegistryError, match=r"'search'.*#/\$defs/Nothing"):
            make(a={"$ref": "#/$defs/Nothing"})

    def test_unknown_field_and_wrong_type(self):
        with pytest.raises(RegistryError, match=r"'f'.*colour"):
            Tool(name="f", description="d", colour="red")
        with pytest.raises(RegistryError, match="description"):
            Tool(name="f", description=3)

    def test_csv_cant_hold_lists(self):
        listing = make(a=TEXT, items={"type": "array", "items": TEXT})
        with pytest.raises(RegistryError, match=r"'search'.*'items'.*use input_format 'json'"):
            ToolRegistry([listing], input_format="csv")
        assert len(ToolRegistry([listing])) == 1

    def test_unknown_input_format(self):
        with pytest.raises(RegistryError, match=r"'xml'.*'csv' or 'json'"):
            ToolRegistry([], input_format="xml")  # type: ignore[arg-type]

    def test_constructor_takes_tools_only(self):
        with pytest.raises(RegistryError, match="from_tools"):
            ToolRegistry([add])  # type: ignore[list-item]


class TestContainer:
    def test_order_and_access(self):
        registry = ToolRegistry([make("b"), make("a")])
        assert registry.names == ("b", "a")
        assert [tool.name for tool in registry] == ["b", "a"]
        assert len(registry) == 2
        assert "a" in registry
        assert "c" not in registry
        assert registry["a"].name == "a"
        with pytest.raises(KeyError, match="no tool 'c' in the registry; it has b, a"):
            registry["c"]

    def test_empty(self):
        assert len(ToolRegistry([])) == 0

    def test_changes_make_new_registries(self):
        registry = ToolRegistry([make("a")], input_format="csv")
        larger = registry.with_tool(add)
        assert larger.names == ("a", "add")
        assert larger.input_format == "csv"
        assert registry.names == ("a",)
        assert larger.without("add") == registry
        with pytest.raises(KeyError):
            registry.without("add")

    def test_a_tool_keeps_no_hold_on_the_dict_it_was_made_from(self):
        properties = {"a": {"type": "string"}}
        registry = ToolRegistry([Tool(name="f", description="d", parameters={"properties": properties})])
        before = registry.fingerprint
        properties["a"]["type"] = "integer"
        registry.to_openai()[0]["function"]["parameters"]["properties"].clear()
        assert ToolRegistry(registry.tools).fingerprint == before

    def test_tools_are_frozen(self):
        with pytest.raises(ValueError, match="frozen"):
            make().name = "other"


class TestFingerprint:
    def test_says_what_the_registry_is(self):
        base = ToolRegistry([make("a"), make("b")])
        others = [
            ToolRegistry([make("b"), make("a")]),
            ToolRegistry([make("a")]),
            ToolRegistry([make("a"), make("b", "Other.")]),
            ToolRegistry([make("a"), make("b", x=TEXT)]),
            ToolRegistry([make("a"), make("b")], input_format="csv"),
        ]
        assert len({base, *others}) == 6
        assert base == ToolRegistry([make("a"), make("b")])
        assert len(base.fingerprint) == 64

    def test_order_of_arguments_counts_and_that_of_keywords_does_not(self):
        first = ToolRegistry([make(a={"type": "string", "description": "x"}, b=TEXT)])
        keywords = ToolRegistry([make(a={"description": "x", "type": "string"}, b=TEXT)])
        arguments = ToolRegistry([make(b=TEXT, a={"type": "string", "description": "x"})])
        assert first == keywords
        assert first != arguments

    def test_another_process_finds_the_same(self):
        path = content_folder("tools") / "gpt4tools_seen.yaml"
        code = f"from loragen_agents import ToolRegistry; print(ToolRegistry.from_yaml({str(path)!r}).fingerprint)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == ToolRegistry.from_yaml(path).fingerprint

    def test_is_stable_across_releases(self):
        # Cached weights are found by it: a change here throws every user's cache away, so it must be meant.
        registry = ToolRegistry([make("f", "d", a={"type": "string", "description": "ü"})])
        assert registry.fingerprint == "dfaeac8cafc40fc744d06e7ff4fe5638d9ab911e25a81d948342ad6129649406"


def test_import_is_light():
    code = (
        "import sys, loragen_agents.registry;"
        "heavy = {'torch', 'transformers', 'langchain', 'langchain_core', 'jsonschema'} & set(sys.modules);"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"import loragen_agents.registry loads {done.stderr}"


@dataclass
class Server:
    path: str

    @property
    def connection(self) -> dict[str, Any]:
        return {"transport": "stdio", "command": sys.executable, "args": [self.path]}


@pytest.fixture
def server(tmp_path) -> Server:
    pytest.importorskip("langchain_mcp_adapters")
    path = tmp_path / "server.py"
    path.write_text(
        "from mcp.server.fastmcp import FastMCP\n"
        "server = FastMCP('shop')\n"
        "@server.tool()\n"
        "def price(article: str, count: int = 1) -> float:\n"
        "    'Tell what something costs.'\n"
        "    return 2.5 * count\n"
        "server.run()\n"
    )
    return Server(str(path))


async def test_mcp_server(server: Server):
    registry = await ToolRegistry.from_mcp({"shop": server.connection}, input_format="csv")
    assert registry.names == ("price",)
    assert registry.input_format == "csv"
    assert registry["price"].argument_names == ("article", "count")
    assert registry["price"].types_of("count") == {"integer"}


async def test_mcp_without_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "langchain_mcp_adapters.client", None)
    with pytest.raises(RegistryError, match=r"pip install 'loragen-agents\[mcp\]'"):
        await ToolRegistry.from_mcp({})


def test_structured_tool_with_a_dict_schema():
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    source = StructuredTool(name="f", description="d", args_schema=schema, func=lambda **_: None)
    assert ToolRegistry.from_tools([source])["f"].parameters["properties"] == {"a": {"type": "integer"}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_toolkit_of_langchain_community(tmp_path):
    from langchain_community.agent_toolkits import FileManagementToolkit

    tools = FileManagementToolkit(root_dir=str(tmp_path)).get_tools()
    registry = ToolRegistry.from_tools(tools)
    assert registry.names == tuple(one.name for one in tools)
    assert registry["write_file"].argument_names == ("file_path", "text", "append")
    assert registry["write_file"].required == {"file_path", "text"}
