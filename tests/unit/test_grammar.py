"""The grammar accepts the steps of its registry and nothing else, and what it forces is what the parser reads."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer

from loragen_agents.conversation.react import (
    Answer,
    InvalidStep,
    ToolStep,
    answer_text,
    format_action_input,
    parse_step,
    tool_step_text,
)
from loragen_agents.edge.decoding import Decoder, Sampling
from loragen_agents.edge.grammar import ToolGrammar, llguidance_tokenizer
from loragen_agents.errors import GrammarError
from loragen_agents.registry import InputFormat, Tool, ToolRegistry
from loragen_agents.support.content import content_folder
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = TOKENIZER.encode("Thought: Do I need to use a tool?", add_special_tokens=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tool(name: str, required: list[str] | None = None, **properties: Any) -> Tool:
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required is not None:
        parameters["required"] = required
    return Tool(name=name, description="A tool.", parameters=parameters)


TEXT = {"type": "string"}
WHOLE = {"type": "integer"}
REGISTRY = ToolRegistry(
    [
        tool("search", ["query"], query=TEXT, limit=WHOLE),
        tool("search images", ["query"], query=TEXT),
        tool('Answer a "question" on a-picture\'s \\ é', ["size"], size={"enum": ["small", 2, None]}, deep=TEXT),
        tool("now"),
    ]
)
CSV = ToolRegistry(
    [
        tool("edit", ["path", "text"], path=TEXT, text=TEXT),
        tool("count", ["n"], n={"type": "integer", "minimum": 2}, on={"type": "boolean"}, unit={"enum": ["cm", "a b"]}),
        tool("maybe", value={"anyOf": [{"type": "number"}, {"type": "null"}]}, note={"type": "string", "maxLength": 5}),
        tool("now"),
    ],
    input_format="csv",
)


def accepts(grammar: ToolGrammar, text: str) -> bool:
    """Whether `text` is a complete step."""
    matcher = grammar.matcher()
    try:
        matcher.accept(TOKENIZER.encode(text, add_special_tokens=False))
        if not matcher.finished:
            matcher.accept([TOKENIZER.eos_token_id])
    except GrammarError:
        return False
    return matcher.finished


def call(action: str, action_input: str) -> str:
    return tool_step_text(action, action_input)


ODD = REGISTRY.names[2]
ACCEPTED = [
    (REGISTRY, call("search", '{"query": "x"}')),
    (REGISTRY, call("search", '{"query": "", "limit": -12}')),
    (REGISTRY, call("search", '{"query": "a \\"b\\" \\\\ \\n é 😀, {", "limit": 0}')),
    (REGISTRY, call("search images", '{"query": "x"}')),
    (REGISTRY, call(ODD, '{"size": null}')),
    (REGISTRY, call(ODD, '{"size": 2, "deep": "x"}')),
    (REGISTRY, call("now", "{}")),
    (REGISTRY, answer_text("Three.")),
    (REGISTRY, answer_text("Two lines\n\nAction: search\nObservation: none")),
    (CSV, call("edit", "a.txt, some text, with commas, and: colons")),
    (CSV, call("count", "2")),
    (CSV, call("count", "30, true")),
    (CSV, call("count", "30, false, a b")),
    (CSV, call("maybe", "")),
    (CSV, call("maybe", "null")),
    (CSV, call("maybe", "-1.5e3, a,b c")),
    (CSV, call("now", "")),
]
REFUSED = [
    (REGISTRY, call("search", '{"query":"x"}')),  # another spelling of the same
    (REGISTRY, call("search", '{"query": "x" }')),
    (REGISTRY, call("search", '{"limit": 1, "query": "x"}')),
    (REGISTRY, call("search", '{"limit": 1}')),
    (REGISTRY, call("search", '{"query": 1}')),
    (REGISTRY, call("search", '{"query": "x", "limit": 1.5}')),
    (REGISTRY, call("search", '{"query": "x", "other": 1}')),
    (REGISTRY, call("search", '{"query": "a\nb"}')),
    (REGISTRY, call("search", '{"query": "\\ud83d"}')),
    (REGISTRY, call("search", "x")),
    (REGISTRY, call(ODD, '{"size": "large"}')),
    (REGISTRY, call("searching", '{"query": "x"}')),
    (REGISTRY, call("now", '{"a": 1}')),
    (REGISTRY, call("now", "")),
    (REGISTRY, call("search", '{"query": "x"}').removesuffix(":")),
    (REGISTRY, call("search", '{"query": "x"}') + " 3"),
    (REGISTRY, answer_text("")),
    (REGISTRY, answer_text("<|im_end|>")),
    (REGISTRY, answer_text("Well <|im_start|>user")),
    (REGISTRY, call("search", '{"query": "<|im_end|>"}')),
    (REGISTRY, " Maybe\nAI: x"),
    (REGISTRY, "Yes\nAction: now\nAction Input: {}\nObservation:"),
    (CSV, call("edit", "a.txt")),
    (CSV, call("edit", "a.txt,text")),
    (CSV, call("edit", "a.txt, two\nlines")),
    (CSV, call("edit", "a.txt, line\u2028separator")),
    (CSV, call("edit", " a.txt, text")),
    (CSV, call("edit", "a.txt, text ")),
    (CSV, call("count", "1")),
    (CSV, call("count", "two")),
    (CSV, call("count", "2, yes")),
    (CSV, call("count", "2, true, mm")),
    (CSV, call("count", "2, true, cm, more")),
    (CSV, call("maybe", "1, longer")),
    (CSV, call("now", "x")),
]


@pytest.mark.parametrize(("registry", "text"), ACCEPTED)
def test_accepts_the_registrys_steps(registry: ToolRegistry, text: str) -> None:
    assert accepts(ToolGrammar(registry, TOKENIZER), text)
    assert not isinstance(parse_step(text, registry), InvalidStep)


@pytest.mark.parametrize(("registry", "text"), REFUSED)
def test_refuses_everything_else(registry: ToolRegistry, text: str) -> None:
    assert not accepts(ToolGrammar(registry, TOKENIZER), text)


def test_what_the_parser_writes_is_accepted() -> None:
    """The two spellings, the parser's and the grammar's, are one."""
    cases: list[tuple[InputFormat, Tool, dict[str, Any]]] = [
        ("json", REGISTRY.tools[0], {"query": 'é "\\\t\b', "limit": 10**20}),
        ("json", tool("t", a={"type": "array", "items": WHOLE}), {"a": [1, 2, 3]}),
        ("json", tool("t", a={"type": "object"}), {"a": {"b": [None, True, {"c": 1.5}]}}),
        ("json", tool("t", a={}), {"a": -0.25}),
        ("csv", CSV.tools[0], {"path": "x y", "text": "a, b"}),
        ("csv", CSV.tools[1], {"n": 7, "on": True, "unit": "a b"}),
    ]
    for input_format, one, arguments in cases:
        registry = ToolRegistry([one], input_format=input_format)
        text = call(one.name, format_action_input(one, arguments, input_format))
        assert accepts(ToolGrammar(registry, TOKENIZER), text), text


def test_tool_choice() -> None:
    texts = {
        "search": call("search", '{"query": "x"}'),
        "now": call("now", "{}"),
        "answer": answer_text("Three."),
    }

    def accepted(choice: str) -> set[str]:
        grammar = ToolGrammar(REGISTRY, TOKENIZER, choice)
        return {name for name, text in texts.items() if accepts(grammar, text)}

    assert accepted("auto") == {"search", "now", "answer"}
    assert accepted("any") == {"search", "now"}
    assert accepted("none") == {"answer"}
    assert accepted("now") == {"now"}
    with pytest.raises(GrammarError, match=r"unknown tool choice 'Search'.*search images"):
        ToolGrammar(REGISTRY, TOKENIZER, "Search")


def test_an_empty_registry_can_only_answer() -> None:
    grammar = ToolGrammar(ToolRegistry([]), TOKENIZER)
    assert accepts(grammar, answer_text("Hello."))
    assert not accepts(grammar, call("now", "{}"))
    with pytest.raises(GrammarError, match="no tools"):
        ToolGrammar(ToolRegistry([]), TOKENIZER, "any")


def test_the_only_way_on_is_forced_as_the_tokenizer_splits_it() -> None:
    registry = ToolRegistry([tool("calculator", ["expression"], expression=TEXT)])
    text = call("calculator", '{"expression": "1"}')
    expected = TOKENIZER.encode(text, add_special_tokens=False)
    matcher = ToolGrammar(registry, TOKENIZER, "calculator").matcher()
    written: list[int] = []
    chosen = 0
    while not matcher.finished:
        forced = matcher.forced_tokens()
        step = forced or [expected[len(written)]]
        chosen += not forced
        matcher.accept(step)
        written += step
        assert written == expected[: len(written)]
    assert written == expected
    # The model chose where the text begins, its content and its end; all else was forced.
    assert chosen <= 4 < len(expected) / 2


def test_forced_tokens_come_first_and_cost_no_pass() -> None:
    model = tiny_model("llama")
    decoder = Decoder(model, TOKENIZER)
    registry = ToolRegistry([tool("now"), tool("nothing")])
    stream = decoder.stream(PROMPT, grammar=ToolGrammar(registry, TOKENIZER, "now"))
    assert "".join(stream) == stream.completion.text == " Yes\nAction: now\nAction Input: {}"
    assert stream.completion.finish_reason == "stop"
    # The whole step is known, so that not even the prompt is read.
    assert len(decoder.prefixes) == 0
    assert list(stream.completion.token_ids) == TOKENIZER.encode(call("now", "{}"), add_special_tokens=False)
    chosen = decoder.generate([PROMPT], grammar=ToolGrammar(registry, TOKENIZER, "any"))[0]
    assert chosen.text in (f" Yes\nAction: {name}\nAction Input: {{}}" for name in registry.names)


def test_forced_tokens_count_against_the_limit() -> None:
    decoder = Decoder(tiny_model("llama"), TOKENIZER)
    grammar = ToolGrammar(ToolRegistry([tool("now")]), TOKENIZER, "now")
    whole = len(TOKENIZER.encode(call("now", "{}"), add_special_tokens=False))
    for limit in (1, 3, whole - 1):
        completion = decoder.generate([PROMPT], Sampling(max_tokens=limit), grammar)[0]
        assert (len(completion.token_ids), completion.finish_reason) == (limit, "length")
    assert decoder.generate([PROMPT], Sampling(max_tokens=whole), grammar)[0].finish_reason == "stop"


def test_stop_tokens_end_an_answer() -> None:
    grammar = ToolGrammar(REGISTRY, TOKENIZER, "none")
    matcher = grammar.matcher(stop_token_ids=[1, 2])
    logits = torch.zeros(len(TOKENIZER))
    matcher.accept(TOKENIZER.encode(answer_text("Hm"), add_special_tokens=False))
    allowed = set(matcher.mask(logits).isfinite().nonzero().flatten().tolist())
    assert {1, 2} < allowed
    assert 0 not in allowed  # the third control token
    matcher.accept([2])
    assert matcher.finished
    with pytest.raises(GrammarError, match="does not allow"):
        matcher.accept([50])


@pytest.mark.parametrize("more", [37, 0, -1])
def test_the_mask_covers_logits_of_any_width(more: int) -> None:
    width = len(TOKENIZER) + more
    grammar = ToolGrammar(REGISTRY, TOKENIZER)
    for matcher in (grammar.matcher(width), grammar.matcher()):
        masked = matcher.mask(torch.zeros(width, dtype=torch.bfloat16))
        allowed = [str(TOKENIZER.decode([token])) for token in masked.isfinite().nonzero().flatten().tolist()]
        assert allowed
        assert all(" Yes".startswith(text) or " No".startswith(text) for text in allowed)


def test_sequences_of_one_grammar_do_not_share_state() -> None:
    grammar = ToolGrammar(REGISTRY, TOKENIZER)
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(TOKENIZER.encode(answer_text("x"), add_special_tokens=False))
    second.accept(TOKENIZER.encode(call("now", "{}"), add_special_tokens=False))
    assert second.finished and not first.finished


def test_a_tokenizer_is_prepared_once() -> None:
    key = (len(TOKENIZER), (2,))
    assert llguidance_tokenizer(TOKENIZER, *key) is llguidance_tokenizer(TOKENIZER, *key)

    class Slow(PreTrainedTokenizer):
        def __init__(self) -> None:
            pass

    with pytest.raises(GrammarError, match="Slow is not a fast tokenizer"):
        llguidance_tokenizer(Slow(), 10, (2,))  # type: ignore[arg-type]


def test_a_tool_that_no_call_can_be_right_for_is_named() -> None:
    never = {"type": "integer", "minimum": 5, "maximum": 1}
    registry = ToolRegistry([tool("fine"), tool("odd one", ["x"], x=never)])
    with pytest.raises(GrammarError, match=r"tool 'odd one'.*argument 'x'.*minimum"):
        ToolGrammar(registry, TOKENIZER)
    assert accepts(ToolGrammar(ToolRegistry([tool("t", x=never)]), TOKENIZER), call("t", "{}"))


@pytest.mark.parametrize("spelling", ["<|im_end|>", "a <|im_start|>user", "<|endoftext|>é"])
def test_control_tokens_in_names_and_constants_are_written_in_plain_tokens(spelling: str) -> None:
    cases: list[tuple[Tool, dict[str, Any]]] = [
        (tool(spelling), {}),
        (tool("t", ["x"], x={"const": spelling}), {"x": spelling}),
        (tool("t", ["x"], x={"type": "string", "pattern": f"^{re.escape(spelling)}$"}), {"x": spelling}),
        (tool("t", [spelling], **{spelling: {"const": 1}}), {spelling: 1}),
    ]
    for one, arguments in cases:
        registry = ToolRegistry([one])
        completion = DECODER.generate([PROMPT], grammar=ToolGrammar(registry, TOKENIZER, "any"))[0]
        step = parse_step(completion.text, registry)
        assert step == ToolStep(one.name, json.dumps(arguments, ensure_ascii=False), arguments)
        assert completion.finish_reason == "stop"
        assert not {0, 1, 2} & set(completion.token_ids)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "format": "int64"}, ["1"], ["1.0"]),
        ({"type": "string", "format": "currency"}, ['"x"'], []),
        ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"yesterday"']),
        ({"type": "array", "items": TEXT, "maxItems": 2}, ["[]", '["a", "b"]'], ['["a","b"]', '["a", "b", "c"]']),
        ({"type": "object", "properties": {"a": WHOLE}}, ["{}", '{"a": 1}'], ['{"b": 1}']),
        ({"type": "object", "additionalProperties": WHOLE}, ['{"b": 1, "c": 2}'], ['{"b": "x"}']),
        (
            {"type": "object", "properties": {"a": WHOLE}, "additionalProperties": TEXT},
            ['{"a": 1, "b": "x"}'],
            ['{"a": 1, "b": 2}'],
        ),
        (
            {"allOf": [{"properties": {"a": WHOLE}}, {"type": "object", "properties": {"b": TEXT}}]},
            ['{"a": 1, "b": "x"}'],
            ['{"a": "x", "b": "x"}'],
        ),
        ({"anyOf": [{"type": "object", "properties": {"a": WHOLE}}, {"type": "null"}]}, ["null", "{}"], ['{"b": 1}']),
        ({"oneOf": [TEXT, WHOLE]}, ['"x"', "3"], ["null", "1.5"]),
        (True, ["1", '"x"', "null", '{"a": [1]}'], []),
        ({"const": {"a": [1, "é"]}}, ['{"a": [1, "é"]}'], ['{"a": [1]}']),
        ({"prefixItems": [WHOLE, TEXT], "items": False, "type": "array"}, ['[1, "x"]'], ['["x"]']),
    ],
)
def test_schemas_within_the_grammar(schema: Any, good: list[str], bad: list[str]) -> None:
    registry = ToolRegistry([tool("t", ["x"], x=schema)])
    grammar = ToolGrammar(registry, TOKENIZER)
    for value in good:
        text = call("t", f'{{"x": {value}}}')
        assert accepts(grammar, text), value
        assert isinstance(parse_step(text, registry), ToolStep), value
    for value in bad:
        assert not accepts(grammar, call("t", f'{{"x": {value}}}')), value


def test_a_schema_that_refers_to_itself() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "name": TEXT}, "required": ["name"]}
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    registry = ToolRegistry([Tool(name="t", description="A tool.", parameters=parameters)])
    grammar = ToolGrammar(registry, TOKENIZER)
    assert accepts(grammar, call("t", '{"x": {"next": {"next": {"name": "c"}, "name": "b"}, "name": "a"}}'))
    assert not accepts(grammar, call("t", '{"x": {"next": {"next": 1, "name": "b"}, "name": "a"}}'))


def test_a_csv_text_does_not_slip_into_json() -> None:
    grammar = ToolGrammar(CSV, TOKENIZER)
    name = CSV.tools[0].name
    assert accepts(grammar, call(name, "x y, a {b}"))
    assert not accepts(grammar, call(name, '{"path": "x y"}, a'))


def test_the_shipped_registries_have_grammars() -> None:
    for path in sorted(content_folder("tools").glob("*.yaml")):
        registry = ToolRegistry.from_yaml(path)
        grammar = ToolGrammar(registry, TOKENIZER)
        for one in registry:
            values = ["picture.png" if one.types_of(name) == {"string"} else "1" for name in one.argument_names]
            text = ", ".join(values)
            if registry.input_format == "json":
                text = json.dumps(dict(zip(one.argument_names, values, strict=True)))
            if isinstance(parse_step(call(one.name, text), registry), ToolStep):
                assert accepts(grammar, call(one.name, text)), (path.name, one.name)


names = st.text(st.sampled_from("ab é-_'\""), min_size=1, max_size=8).filter(lambda name: name.strip() == name)
scalars = st.one_of(
    st.just(TEXT),
    st.just(WHOLE),
    st.just({"type": "boolean"}),
    st.builds(lambda low: {"type": "integer", "minimum": low, "maximum": low + 20}, st.integers(-50, 50)),
    st.builds(lambda most: {"type": "string", "maxLength": most, "minLength": 1}, st.integers(2, 6)),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.sampled_from(["a", "b c", 1, -2.5, None, True]), min_size=1)
    ),
    st.builds(lambda kind: {"anyOf": [kind, {"type": "null"}]}, st.sampled_from([TEXT, WHOLE])),
)
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(lambda fields: {"type": "object", "properties": fields}, st.dictionaries(names, inner, max_size=2)),
    ),
    max_leaves=4,
)


@st.composite
def registries(draw: st.DrawFn) -> ToolRegistry:
    formats: list[InputFormat] = ["json", "csv"]
    input_format = draw(st.sampled_from(formats))
    arguments = st.dictionaries(names, scalars if input_format == "csv" else nested, max_size=3)
    tools = []
    for name in draw(st.lists(names, unique=True, min_size=1, max_size=3)):
        properties = draw(arguments)
        tools.append(tool(name, [key for key in properties if draw(st.booleans())], **properties))
    return ToolRegistry(tools, input_format=input_format)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(registry=registries(), seed=st.integers(0, 2**31), hot=st.booleans())
def test_whatever_a_model_writes_within_the_grammar_is_read_as_a_step(
    registry: ToolRegistry, seed: int, hot: bool
) -> None:
    grammar = ToolGrammar(registry, TOKENIZER)
    sampling = Sampling(max_tokens=80, temperature=3.0 if hot else 1.0, seed=seed)
    stream = DECODER.stream(PROMPT, sampling, grammar)
    assert "".join(stream) == stream.completion.text
    text = stream.completion.text
    step = parse_step(text, registry, cut_off=stream.completion.finish_reason == "length")
    if stream.completion.finish_reason == "length":
        # Cut off before its end: a text may be anything that begins a step, but an answer is one already.
        assert isinstance(step, Answer) == text.startswith(" No\nAI: ")
    else:
        assert isinstance(step, ToolStep | Answer), (text, step)
        assert isinstance(step, Answer) or step.action in registry
    # All control tokens but the closing one are ruled out.
    assert not {0, 1, 2} & set(stream.completion.token_ids[:-1])


DECODER = Decoder(tiny_model("llama"), TOKENIZER)
