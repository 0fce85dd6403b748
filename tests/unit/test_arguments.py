"""Action Inputs: bound to the schema with the right types, and written so that they read back the same."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen_agents.errors import ArgumentError
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.registry.arguments import bind_arguments, format_action_input

TEXT = {"type": "string"}
INTEGER = {"type": "integer"}
NUMBER = {"type": "number"}
BOOLEAN = {"type": "boolean"}


def make(required: list[str] | None = None, **properties: Any) -> Tool:
    names = list(properties) if required is None else required
    return Tool(name="f", description="d", parameters={"properties": properties, "required": names})


EDIT = make(image=TEXT, old=TEXT, new=TEXT)


class TestCsv:
    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            ("a.png, cat, dog", {"image": "a.png", "old": "cat", "new": "dog"}),
            ("a.png,cat,dog", {"image": "a.png", "old": "cat", "new": "dog"}),
            ("  a.png ,  cat,dog \n", {"image": "a.png", "old": "cat", "new": "dog"}),
            ("a.png, cat, a big, brown,dog", {"image": "a.png", "old": "cat", "new": "a big, brown,dog"}),
        ],
    )
    def test_texts(self, text: str, arguments: dict[str, str]):
        assert bind_arguments(EDIT, text, "csv") == arguments

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.png, cat", "argument 'new': is required but missing"),
            ("", "argument 'image': is required but missing"),
            ("a.png, , dog", "argument 'old': its value is empty"),
            ("a.png, cat,", "argument 'new': its value is empty"),
            ("a.png, cat, dog\nmore", "one line"),
        ],
    )
    def test_what_does_not_fit(self, text: str, message: str):
        with pytest.raises(ArgumentError, match=message):
            bind_arguments(EDIT, text, "csv")

    @pytest.mark.parametrize(
        ("schema", "text", "value"),
        [
            (INTEGER, "5", 5),
            (INTEGER, "-12", -12),
            (INTEGER, "5.0", 5),
            (NUMBER, "5", 5),
            (NUMBER, "5.0", 5.0),
            (NUMBER, "-1e-3", -0.001),
            (BOOLEAN, "true", True),
            (BOOLEAN, "False", False),
            ({"type": "null"}, "null", None),
            (TEXT, "5", "5"),
            (TEXT, "true", "true"),
            (TEXT, "null", "null"),
            ({"type": ["integer", "null"]}, "null", None),
            ({"type": ["string", "null"]}, "null", None),
            ({"anyOf": [INTEGER, TEXT]}, "5", 5),
            ({"anyOf": [INTEGER, TEXT]}, "five", "five"),
            ({"anyOf": [{"type": "integer", "minimum": 10}, TEXT]}, "5", "5"),
            ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}, "7", 7),
            ({"enum": ["red", "blue"]}, "blue", "blue"),
            ({"enum": [1, 2]}, "2", 2),
            ({"enum": ["1", 2]}, "1", "1"),
            ({"enum": [None, "x"]}, "null", None),
            ({"const": "on"}, "on", "on"),
            ({}, "5", 5),
            (True, "word", "word"),
        ],
        ids=repr,
    )
    def test_types(self, schema: Any, text: str, value: Any):
        bound = bind_arguments(make(a=schema), text, "csv")["a"]
        assert bound == value
        assert type(bound) is type(value)

    @pytest.mark.parametrize(
        ("schema", "text"),
        [
            (INTEGER, "five"),
            (INTEGER, "5.5"),
            (INTEGER, "1e400"),
            (INTEGER, "0x10"),
            (INTEGER, "1_000"),
            (INTEGER, "٣"),
            (INTEGER, "9" * 5000),
            (NUMBER, "nan"),
            (NUMBER, "Infinity"),
            (NUMBER, "1e400"),
            (NUMBER, "5 km"),
            (BOOLEAN, "yes"),
            (BOOLEAN, "1"),
            ({"enum": ["red", "blue"]}, "Red"),
            ({"type": "integer", "minimum": 3}, "2"),
            ({"type": "string", "pattern": "^[a-z]+$"}, "A1"),
            ({"type": "string", "maxLength": 3}, "long"),
            (False, "x"),
        ],
        ids=repr,
    )
    def test_values_of_another_type(self, schema: Any, text: str):
        with pytest.raises(ArgumentError, match="tool 'f', argument 'a'"):
            bind_arguments(make(a=schema), text, "csv")

    def test_too_many_values_without_a_text_to_hold_them(self):
        with pytest.raises(ArgumentError, match=r"takes 2 values \(a, b\), got 3"):
            bind_arguments(make(a=INTEGER, b={"enum": ["x"]}), "1, x, 2", "csv")
        with pytest.raises(ArgumentError, match=r"takes 0 values"):
            bind_arguments(make(), "x", "csv")

    def test_the_last_text_keeps_its_commas_where_a_number_follows(self):
        tool = make(query=TEXT, count=INTEGER)
        assert bind_arguments(tool, "red, green, blue, 3", "csv") == {"query": "red, green, blue", "count": 3}

    def test_optional_arguments_are_left_out_from_the_end(self):
        tool = make(["a"], a=TEXT, b=INTEGER, c=BOOLEAN)
        assert bind_arguments(tool, "x", "csv") == {"a": "x"}
        assert bind_arguments(tool, "x, 2", "csv") == {"a": "x", "b": 2}
        assert format_action_input(tool, {"a": "x"}, "csv") == "x"
        assert format_action_input(tool, {"b": 2, "a": "x"}, "csv") == "x, 2"
        with pytest.raises(ArgumentError, match=r"argument 'b': csv can leave out arguments at the end only"):
            format_action_input(tool, {"a": "x", "c": True}, "csv")

    def test_a_word_where_a_number_belongs_is_no_part_of_the_text_before(self):
        with pytest.raises(ArgumentError, match="argument 'count': expected integer"):
            bind_arguments(make(["query"], query=TEXT, count=INTEGER), "red, green", "csv")

    def test_no_arguments(self):
        assert bind_arguments(make(), "", "csv") == {}
        assert format_action_input(make(), {}, "csv") == ""

    @pytest.mark.parametrize(
        "arguments",
        [
            {"image": "a, b", "old": "c", "new": "d"},
            {"image": "a", "old": "c\nd", "new": "e"},
            {"image": "a", "old": "c", "new": "d\ne"},
            {"image": "a", "old": "", "new": "d"},
            {"image": "a", "old": "b", "new": ""},
            {"image": " a", "old": "b", "new": "c"},
            {"image": "a", "old": "b", "new": "c "},
            {"image": "a", "old": "b", "new": ["c"]},
            {"image": "a", "old": "b", "new": 3},
            {"image": "a", "old": "b"},
            {"image": "a", "old": "b", "new": "c", "size": 2},
        ],
        ids=repr,
    )
    def test_what_csv_cant_express(self, arguments: dict[str, Any]):
        with pytest.raises(ArgumentError, match="tool 'f'"):
            format_action_input(EDIT, arguments, "csv")

    def test_a_text_that_would_be_read_as_a_number(self):
        with pytest.raises(ArgumentError, match="csv can't express"):
            format_action_input(make(a={"type": ["string", "integer"]}), {"a": "5"}, "csv")
        with pytest.raises(ArgumentError, match="csv can't express"):
            format_action_input(make(a={"type": ["string", "null"]}), {"a": "null"}, "csv")


class TestJson:
    def test_one_line_in_schema_order(self):
        tool = make(["a"], a=TEXT, b=INTEGER)
        text = format_action_input(tool, {"b": 2, "a": 'é "x"\n'}, "json")
        assert text == '{"a": "é \\"x\\"\\n", "b": 2}'
        assert bind_arguments(tool, text, "json") == {"a": 'é "x"\n', "b": 2}

    def test_nested_keys_in_schema_order(self):
        point = {"type": "object", "properties": {"x": INTEGER, "y": INTEGER}}
        circle = {"type": "object", "properties": {"r": INTEGER, "at": point}, "required": ["r"]}
        tool = make(path={"type": "array", "items": point}, shape={"anyOf": [{"type": "null"}, circle]})
        arguments = {"shape": {"at": {"y": 1, "x": 2}, "r": 3}, "path": [{"y": 4, "x": 5}]}
        expected = '{"path": [{"x": 5, "y": 4}], "shape": {"r": 3, "at": {"x": 2, "y": 1}}}'
        assert format_action_input(tool, arguments, "json") == expected

    def test_recursive_schema(self):
        node = {
            "type": "object",
            "properties": {"v": INTEGER, "kids": {"type": "array", "items": {"$ref": "#/$defs/N"}}},
        }
        tool = Tool(
            name="f",
            description="d",
            parameters={"properties": {"root": {"$ref": "#/$defs/N"}}, "$defs": {"N": {**node, "required": ["v"]}}},
        )
        text = format_action_input(tool, {"root": {"kids": [{"kids": [], "v": 2}], "v": 1}}, "json")
        assert text == '{"root": {"v": 1, "kids": [{"v": 2, "kids": []}]}}'
        with pytest.raises(ArgumentError, match="argument 'root': 'v' is a required property"):
            bind_arguments(tool, '{"root": {"v": 1, "kids": [{}]}}', "json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "expected a JSON object"),
            ("x", "expected a JSON object"),
            ('{"a": "x"', "expected a JSON object"),
            ('{"a": "x"} {"a": "y"}', "expected a JSON object"),
            ('["x"]', "expected a JSON object"),
            ("null", "expected a JSON object"),
            ('{"a": "x", "a": "y"}', "'a' stands in it twice"),
            ('{"a": NaN}', "NaN is not JSON"),
            ('{"a": 1e999}', "out of range"),
            ('{"a": "\\ud800"}', "surrogate"),
            ("{}", "argument 'a': is required but missing"),
            ('{"a": "x", "b": 1}', "argument 'b': is unknown; the tool takes a"),
            ('{"a": 1}', "argument 'a': 1 is not of type 'string'"),
            ('{"a": null}', "argument 'a': None is not of type 'string'"),
            ('{"a": ' + "[" * 20000, "expected a JSON object"),
            ('{"a": ' + "9" * 5000 + "}", "expected a JSON object"),
        ],
        ids=lambda value: value[:20],
    )
    def test_what_does_not_fit(self, text: str, message: str):
        with pytest.raises(ArgumentError, match=message):
            bind_arguments(make(a=TEXT), text, "json")

    @pytest.mark.parametrize(
        ("schema", "text", "value"),
        [
            (INTEGER, "5", 5),
            (INTEGER, "5.0", 5),
            (NUMBER, "5", 5),
            (NUMBER, "5.0", 5.0),
            (BOOLEAN, "true", True),
            ({"anyOf": [TEXT, {"type": "null"}]}, "null", None),
            ({"enum": ["a", 2]}, "2", 2),
            ({"type": "array", "items": INTEGER}, "[1, 2]", [1, 2]),
            ({"type": "object", "properties": {"x": BOOLEAN}}, '{"x": false}', {"x": False}),
        ],
        ids=repr,
    )
    def test_types(self, schema: Any, text: str, value: Any):
        bound = bind_arguments(make(a=schema), f'{{"a": {text}}}', "json")["a"]
        assert bound == value
        assert type(bound) is type(value)

    @pytest.mark.parametrize(
        ("schema", "text"),
        [(INTEGER, '"5"'), (INTEGER, "5.5"), (INTEGER, "true"), (BOOLEAN, "1"), (TEXT, "5"), ({"enum": ["a"]}, '"b"')],
        ids=repr,
    )
    def test_values_are_never_converted(self, schema: Any, text: str):
        with pytest.raises(ArgumentError, match="argument 'a'"):
            bind_arguments(make(a=schema), f'{{"a": {text}}}', "json")

    def test_unknown_arguments_where_the_schema_is_open(self):
        schema = {"properties": {"a": TEXT}, "additionalProperties": INTEGER}
        tool = Tool(name="f", description="d", parameters=schema)
        assert bind_arguments(tool, '{"b": 1}', "json") == {"b": 1}
        assert format_action_input(tool, {"b": 1, "a": "x"}, "json") == '{"a": "x", "b": 1}'
        with pytest.raises(ArgumentError, match="argument 'b'"):
            bind_arguments(tool, '{"b": "x"}', "json")

    @pytest.mark.parametrize("value", [{1, 2}, b"x", float("nan"), object(), {1: "x"}, "\ud800"])
    def test_what_json_cant_express(self, value: Any):
        with pytest.raises(ArgumentError, match="tool 'f'"):
            format_action_input(make(a=True), {"a": value}, "json")

    def test_line_separators_do_not_break_the_line(self):
        text = format_action_input(make(a=TEXT), {"a": "x\r\n\x0by\x85z"}, "json")
        assert "\n" not in text
        assert "\r" not in text


SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (TEXT, st.text()),
    (INTEGER, st.integers()),
    (NUMBER, st.floats(allow_nan=False, allow_infinity=False) | st.integers()),
    (BOOLEAN, st.booleans()),
    ({"enum": ["red", "light blue", 3, None, True]}, st.sampled_from(["red", "light blue", 3, None, True])),
    ({"anyOf": [INTEGER, {"type": "null"}]}, st.none() | st.integers()),
    ({"type": ["string", "number", "boolean", "null"]}, st.text() | st.integers() | st.booleans() | st.none()),
]


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    """A schema, and a strategy for values of it."""
    kind = draw(st.sampled_from(["scalar", "array", "object"] if depth else ["scalar"]))
    if kind == "scalar":
        return draw(st.sampled_from(SCALARS))
    if kind == "array":
        schema, values = draw(schemas(depth=depth - 1))
        return {"type": "array", "items": schema}, st.lists(values, max_size=3)
    schema, values = draw(objects(depth=depth - 1))
    return schema, values


@st.composite
def objects(draw: st.DrawFn, depth: int, scalars: bool = False) -> tuple[Any, st.SearchStrategy[Any]]:
    names = draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=4))
    inner = [draw(st.sampled_from(SCALARS) if scalars else schemas(depth=depth)) for _ in names]
    required = draw(st.sets(st.sampled_from(names))) if names else set()
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in zip(names, inner, strict=True)},
        "required": sorted(required),
    }
    strategies = {name: values for name, (_, values) in zip(names, inner, strict=True)}
    return schema, st.fixed_dictionaries(
        {name: strategies[name] for name in names if name in required},
        optional={name: strategies[name] for name in names if name not in required},
    )


@given(st.data())
def test_json_round_trip(data: st.DataObject):
    schema, values = data.draw(objects(depth=2))
    tool = Tool(name="f", description="d", parameters=schema)
    arguments = data.draw(values)
    text = format_action_input(tool, arguments, "json")
    assert "\n" not in text
    assert bind_arguments(tool, text, "json") == arguments
    assert json.loads(text) == arguments
    assert format_action_input(tool, bind_arguments(tool, text, "json"), "json") == text


@given(st.data())
def test_csv_round_trip_or_refusal(data: st.DataObject):
    schema, values = data.draw(objects(depth=0, scalars=True))
    tool = Tool(name="f", description="d", parameters=schema)
    arguments = data.draw(values)
    try:
        text = format_action_input(tool, arguments, "csv")
    except ArgumentError:
        return
    assert "\n" not in text
    bound = bind_arguments(tool, text, "csv")
    assert bound == arguments
    assert [type(bound[name]) is bool for name in bound] == [type(arguments[name]) is bool for name in bound]


plain = st.text(st.characters(exclude_characters=",\n", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text == text.strip()
)
with_commas = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text == text.strip() and text.strip(",") == text
)


@given(image=plain, old=plain, new=with_commas)
def test_csv_expresses_every_plain_text(image: str, old: str, new: str):
    arguments = {"image": image, "old": old, "new": new}
    text = format_action_input(EDIT, arguments, "csv")
    assert text == f"{image}, {old}, {new}"
    assert bind_arguments(EDIT, text, "csv") == arguments


@given(st.text() | st.text('{}[]",:\\ntrue0123eE.+-', max_size=60), st.sampled_from(["csv", "json"]))
def test_any_text_is_bound_or_refused(text: str, notation: Any):
    tool = make(["a"], a=TEXT, b=NUMBER, c={"enum": ["x", None]})
    ToolRegistry([tool], input_format=notation)
    try:
        arguments = bind_arguments(tool, text, notation)
    except ArgumentError as error:
        assert "tool 'f'" in str(error)
    else:
        assert "a" in arguments
