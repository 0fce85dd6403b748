"""Choosing a tool by its name and by state: the figures, and what a specialised model makes of them."""

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
        backgrounds=torch.zeros(2, len(layers), own.shape[-1]),
        weights=torch.full((2, len(layers)), 20.0),
        threshold=torch.tensor(threshold),
    )


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


def passes(special: SpecializedLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens read, logits asked for) of every pass from here on."""
    found: list[tuple[int, int]] = []
    forward = special.decoder._forward()

    class Counted:
        cache = staticmethod(forward.cache)

        def __call__(self, ids, cache, keep, layout=None, captured=None, updates=None):
            found.append((ids.shape[1], keep.shape[1]))
            return forward(ids, cache, keep, layout, captured, updates)

    monkeypatch.setattr(special.decoder, "_forward", Counted)
    return found


def test_names_that_cannot_win_are_not_read(special, monkeypatch):
    """Two passes choose a tool whose match is far ahead; where no tool is, all names are read, in a third."""
    prompt = special.renderer.user_turn(TURNS)
    step = special.renderer.encode_text(" Yes\nAction: ruler\nAction Input:")
    match = matching(special, TURNS[0].request, "ruler", threshold=20.0)
    for weight, expected in ((1e3, 2), (0.0, 3)):
        fresh = SpecializedLM(special.edge, special.weights, special.registry, match)
        scorer = ToolScorer(fresh.decoder, fresh.renderer, fresh.registry, match, weights=ChoiceWeights(match=weight))
        counted = passes(fresh, monkeypatch)
        found = scorer(scorer.read(prompt))
        assert len(counted) == expected and counted[0] == (len(prompt) + 4, 2)
        if weight:
            assert found.tools["ruler"] > 0.99 and counted[1][0] == len(step) - 4


def test_a_match_reads_back_as_it_was_written(special, tmp_path):
    match = matching(special, TURNS[0].request, "ruler", threshold=20.0)
    match.save(tmp_path / "match.safetensors")
    back = ToolMatch.load(tmp_path / "match.safetensors")
    requests = torch.randn(2, 5, match.name_keys.shape[-1])
    assert back.layers == match.layers
    torch.testing.assert_close(back.decide(requests), match.decide(requests))
    torch.testing.assert_close(back.choose(requests), match.choose(requests))
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
