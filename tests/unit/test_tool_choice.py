"""Choosing a tool by its name and by state: the figures, and what a specialised model makes of them."""

from dataclasses import replace

import pytest
import torch

from loragen_agents.adapter.tool_match import ToolMatch
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import Answer, ToolStep, parse_step
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.edge.tool_choice import NEUTRAL_REQUESTS, ChoiceWeights, ToolScorer
from loragen_agents.errors import CheckpointError
from loragen_agents.generator.tool_reading import capture_down_proj_inputs
from loragen_agents.registry import ToolRegistry
from tests.unit.test_specialized import language_model, random_weights, registry

TURNS = [Turn("How long is the table?")]
NAMES = ("find", "find_all", "ruler", "weather report")


@pytest.fixture(scope="module")
def special() -> SpecializedLM:
    return SpecializedLM(language_model(), random_weights(3), registry(*NAMES))


def log_probability(special: SpecializedLM, prompt: list[int], continuation: list[int]) -> float:
    """One plain forward pass for one continuation."""
    with torch.no_grad():
        logits = special.model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0]
    places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return sum(logits[place].log_softmax(-1)[token].item() for place, token in zip(places, continuation, strict=True))


def name_scores(special: SpecializedLM, request: str) -> list[float]:
    renderer = special.renderer
    prompt = renderer.user_turn([Turn(request)]) + renderer.encode_text(" Yes\nAction:")
    return [log_probability(special, prompt, renderer.encode_text(f" {name}\n")) for name in NAMES]


def test_priors_are_mean_scores_behind_requests_that_call_for_nothing(special):
    scores = torch.tensor([name_scores(special, request) for request in NEUTRAL_REQUESTS])
    torch.testing.assert_close(torch.tensor(special.scorer.priors), scores.mean(dim=0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_probabilities_are_scores_less_the_share_of_priors(special, weight):
    prompt = special.renderer.user_turn(TURNS)
    scorer = ToolScorer(special.decoder, special.renderer, special.registry, weights=ChoiceWeights(prior=weight))
    found = scorer(scorer.read(prompt))
    scores = torch.tensor(name_scores(special, TURNS[0].request))
    expected = (scores - weight * torch.tensor(scorer.priors)).softmax(0)
    torch.testing.assert_close(torch.tensor(list(found.tools.values())), expected, atol=1e-3, rtol=1e-3)
    assert list(found.tools) == list(NAMES) and found.best == NAMES[int(expected.argmax())]
    yes, no = (log_probability(special, prompt, special.renderer.encode_text(word)[:1]) for word in (" Yes", " No"))
    assert found.calls_tool == pytest.approx(torch.tensor([yes, no]).softmax(0)[0].item(), abs=1e-3)


def test_priors_that_are_given_are_not_worked_out_again(special):
    scorer = ToolScorer(
        special.decoder,
        special.renderer,
        special.registry,
        weights=ChoiceWeights(prior=1.0),
        priors=[0.0, -1e3, 1e3, 0.0],
    )
    assert scorer(scorer.read(special.renderer.user_turn(TURNS))).best == "find_all"


def matching(special: SpecializedLM, request: str, tool: str, threshold: float) -> ToolMatch:
    """A match whose keys are random, but for one tool's, which are the request's own activations."""
    torch.manual_seed(4)
    layers = (1, 2)
    prompt = special.renderer.user_turn([Turn(request)])
    called = special.renderer.encode_text(" Yes\nAction:")
    own = capture_down_proj_inputs(special.model, layers, torch.tensor([[*prompt, *called]]))[:, 0]
    keys = torch.randn(2, len(layers), len(NAMES), own.shape[-1])
    keys[0, :, NAMES.index(tool)], keys[1, :, NAMES.index(tool)] = own[:, len(prompt) - 1], own[:, -1]
    keys = torch.nn.functional.normalize(keys, dim=-1)
    return ToolMatch(
        layers,
        keys[0],
        keys[1],
        backgrounds=torch.zeros(3, len(layers), own.shape[-1]),
        weights=torch.full((3, len(layers)), 20.0),
        threshold=torch.tensor(threshold),
        argument_keys=keys[0, :, :0],
        argument_counts=torch.zeros(len(NAMES), dtype=torch.long),
        argument_threshold=torch.tensor(20.0),
    )


def with_arguments(special: SpecializedLM, request: str, given: set[str]) -> ToolMatch:
    """A match of the tool `ruler` alone, whose keys for the arguments in `given` are the request's own activations."""
    match = matching(special, request, "ruler", threshold=20.0)
    step = special.renderer.encode_text(" Yes\nAction: ruler\nAction Input:")
    prompt = special.renderer.user_turn([Turn(request)])
    own = capture_down_proj_inputs(special.model, match.layers, torch.tensor([[*prompt, *step]]))[:, 0, -1]
    names = special.registry["ruler"].argument_names
    keys = torch.stack([own if name in given else -own for name in names], dim=1)
    counts = torch.tensor([len(names) * (name == "ruler") for name in special.registry.names])
    return replace(match, argument_keys=torch.nn.functional.normalize(keys, dim=-1), argument_counts=counts)


@pytest.mark.parametrize("tool", ["find_all", "ruler"])
@pytest.mark.parametrize("before", [[], [Turn("Good day!", (), "Good day to you.")]])
def test_a_request_is_matched_at_its_own_activations(special, tool, before):
    """Also where most of the prompt is known from before, and where a single token is left to read."""
    match = matching(special, TURNS[0].request, tool, threshold=20.0)
    scorer = ToolScorer(special.decoder, special.renderer, special.registry, match, weights=ChoiceWeights(match=1e3))
    prompt = special.renderer.user_turn([*before, *TURNS])
    for _ in range(2):
        read = scorer.read(prompt)
        expected = capture_down_proj_inputs(special.model, match.layers, torch.tensor([prompt]))[:, 0, -1]
        torch.testing.assert_close(read.prompt.activations, expected, atol=1e-5, rtol=1e-4)
    if not before:
        found = scorer(read)
        assert found.best == tool and found.calls_tool > 0.9
        said = ToolScorer(special.decoder, special.renderer, special.registry)(read).calls_tool
        assert scorer(read, opening=False).calls_tool == pytest.approx(said)


def test_the_match_at_the_action_counts_in_the_decision_too(special):
    """Where the likeliest tool is far above the floor there, a tool is called, and far below it none is."""
    match = matching(special, TURNS[0].request, "ruler", threshold=20.0)
    read = ToolScorer(special.decoder, special.renderer, special.registry, match).read(
        special.renderer.user_turn(TURNS)
    )
    for floor, least, most in ((0.0, 0.99, 1.0), (200.0, 0.0, 0.01)):
        weights = ChoiceWeights(floor=floor)
        scorer = ToolScorer(special.decoder, special.renderer, special.registry, match, weights=weights)
        assert least <= scorer(read).calls_tool <= most
        assert scorer(read, opening=False).calls_tool == pytest.approx(
            ToolScorer(special.decoder, special.renderer, special.registry)(read).calls_tool
        )


def test_a_request_that_no_key_is_like_calls_no_tool(special):
    match = matching(special, "Something else entirely", "ruler", threshold=60.0)
    scorer = ToolScorer(special.decoder, special.renderer, special.registry, match)
    assert scorer(scorer.read(special.renderer.user_turn(TURNS))).calls_tool < 0.1


RULER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["cm", "inch"]},
        "precise": {"type": "boolean"},
        "object": {"enum": ["table", "door"]},
    },
    "required": ["unit"],
}


@pytest.fixture(scope="module")
def choosing() -> SpecializedLM:
    tools = [
        tool.model_copy(update={"parameters": RULER}) if tool.name == "ruler" else tool for tool in registry(*NAMES)
    ]
    return SpecializedLM(language_model(), random_weights(3), ToolRegistry(tools))


@pytest.mark.parametrize("given", [set(), {"precise"}, {"object"}, {"precise", "object"}])
@pytest.mark.parametrize("tool_choice", ["any", "ruler"])
def test_a_call_has_the_optional_arguments_that_its_request_is_matched_with(choosing, given, tool_choice):
    match = with_arguments(choosing, TURNS[0].request, given)
    special = SpecializedLM(choosing.edge, choosing.weights, choosing.registry, match)
    special.scorer.weights = ChoiceWeights(sure=0.75)
    stream = special.stream(TURNS, Sampling(max_tokens=60), tool_choice=tool_choice)
    step = parse_step("".join(stream), special.registry)
    assert isinstance(step, ToolStep) and step.arguments.keys() == {"unit", *given}
    (completion,) = special.generate([TURNS], Sampling(max_tokens=60), tool_choice=tool_choice)
    assert completion.text == stream.completion.text
    assert (stream.tools is None) == (tool_choice == "ruler")


def passes(special: SpecializedLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens read, logits asked for) of every pass from here on."""
    found: list[tuple[int, int]] = []
    forward = special.decoder._forward()

    class Counted:
        taps = forward.taps

        def __call__(self, ids, cache, keep, layout=None, taps=None):
            found.append((ids.shape[1], keep.shape[1]))
            return forward(ids, cache, keep, layout, taps)

    monkeypatch.setattr(special.decoder, "_forward", Counted)
    return found


def test_a_call_is_decoded_from_where_its_arguments_were_matched(choosing, monkeypatch):
    """With the tool given, all up to `Action Input:` is one pass, and none of it is read again."""
    match = with_arguments(choosing, TURNS[0].request, {"object"})
    special = SpecializedLM(choosing.edge, choosing.weights, choosing.registry, match)
    special.scorer.weights = ChoiceWeights(sure=0.75)
    counted = passes(special, monkeypatch)
    "".join(special.stream(TURNS, Sampling(max_tokens=60), tool_choice="ruler"))
    prompt, step = special.renderer.user_turn(TURNS), special.renderer.encode_text(" Yes\nAction: ruler\nAction Input:")
    assert counted[0] == (len(prompt) + len(step), 2) and counted[1][0] < len(step)


def test_names_that_cannot_win_are_not_read(choosing, monkeypatch):
    """Two passes choose a tool whose match is far ahead; where no tool is, all names are read, in a third."""
    prompt = choosing.renderer.user_turn(TURNS)
    step = choosing.renderer.encode_text(" Yes\nAction: ruler\nAction Input:")
    match = matching(choosing, TURNS[0].request, "ruler", threshold=20.0)
    for weight, expected in ((1e3, 2), (0.0, 3)):
        special = SpecializedLM(choosing.edge, choosing.weights, choosing.registry, match)
        scorer = ToolScorer(
            special.decoder, special.renderer, special.registry, match, weights=ChoiceWeights(match=weight)
        )
        counted = passes(special, monkeypatch)
        found = scorer(scorer.read(prompt))
        assert len(counted) == expected and counted[0] == (len(prompt) + 4, 2)
        if weight:
            assert found.tools["ruler"] > 0.99 and counted[1][0] == len(step) - 4


def test_what_the_match_is_not_sure_of_is_left_to_the_model(choosing):
    match = with_arguments(choosing, TURNS[0].request, {"object"})
    prompt = choosing.renderer.user_turn(TURNS)
    scorer = ToolScorer(choosing.decoder, choosing.renderer, choosing.registry, match, weights=ChoiceWeights(sure=0.75))
    found = scorer.arguments(scorer.read(prompt, "ruler"), "ruler")
    assert found.keys() == {"precise", "object"} and found["precise"] < 0.01 and found["object"] > 0.99
    unsure = replace(match, weights=match.weights * 0, argument_threshold=torch.tensor(0.0))
    alone = ChoiceWeights(sure=0.6)
    for kept, weights in ((unsure, alone), (match, replace(alone, sure=1.0)), (None, alone)):
        special = SpecializedLM(choosing.edge, choosing.weights, choosing.registry, kept)
        special.scorer.weights = weights
        text = "".join(special.stream(TURNS, Sampling(max_tokens=60), tool_choice="ruler"))
        free = choosing.decoder.stream(prompt, Sampling(max_tokens=60), choosing.grammar("ruler"))
        assert text == "".join(free)


def test_a_match_reads_back_as_it_was_written(special, tmp_path):
    match = with_arguments(special, TURNS[0].request, {"unit"})
    match.save(tmp_path / "match.safetensors")
    back = ToolMatch.load(tmp_path / "match.safetensors")
    requests = torch.randn(2, 5, match.name_keys.shape[-1])
    assert back.layers == match.layers
    torch.testing.assert_close(back.decide(requests), match.decide(requests))
    torch.testing.assert_close(back.choose(requests), match.choose(requests))
    ruler = NAMES.index("ruler")
    torch.testing.assert_close(back.given(ruler, requests), match.given(ruler, requests))
    assert [back.matches_arguments(n) for n in range(len(NAMES))] == [n == ruler for n in range(len(NAMES))]
    (tmp_path / "match.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"match\.safetensors is not a tool match"):
        ToolMatch.load(tmp_path / "match.safetensors")


def test_the_chosen_tool_is_the_one_that_is_called(special):
    stream = special.stream(TURNS, Sampling(max_tokens=40), tool_choice="any")
    text = "".join(stream)
    assert stream.tools is not None
    step = parse_step(text, special.registry)
    assert isinstance(step, ToolStep) and step.action == stream.tools.best
    (completion,) = special.generate([TURNS], Sampling(max_tokens=40), tool_choice="any")
    assert completion.text == text == stream.completion.text
    assert completion.first_token_seconds > 0 and completion.cached_tokens <= completion.prompt_tokens


def test_the_decision_follows_its_probability(special):
    stream = special.stream(TURNS, Sampling(max_tokens=40))
    text = "".join(stream)
    assert stream.tools is not None
    step = parse_step(text, special.registry, cut_off=stream.completion.finish_reason == "length")
    assert isinstance(step, Answer) == (stream.tools.calls_tool < 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"score_tools": False},
        {"grammar": False},
        {"tool_choice": "ruler"},
        {"tool_choice": "none"},
        {"sampling": Sampling(max_tokens=8, temperature=1.0, seed=1)},
    ],
)
def test_nothing_is_scored_where_there_is_no_choice_to_make(special, settings):
    stream = special.stream(TURNS, **{"sampling": Sampling(max_tokens=8), **settings})
    assert stream.tools is None and "".join(stream) == stream.completion.text
