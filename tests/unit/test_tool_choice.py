"""Choosing a tool by keys and by names: the figures, and what a specialised model makes of them."""

import pytest
import torch

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.adapter.tool_keys import RequestMaps, ToolKeys
from loragen_agents.adapter.updates import DownUpdates
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.react import Answer, ToolStep, parse_step
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.edge.tool_choice import KeyScorer, NameScorer
from loragen_agents.generator.tool_reading import capture_down_proj_inputs
from tests.unit.test_specialized import HIDDEN, LAYERS, WIDTH, language_model, random_weights, registry

TURNS = [Turn("How long is the table?")]
NAMES = ("find", "find_all", "ruler", "weather report")
WATCHED = (1, 2)


@pytest.fixture(scope="module")
def special() -> SpecializedLM:
    return SpecializedLM(language_model(), random_weights(3), registry(*NAMES))


def log_probability(special: SpecializedLM, prompt: list[int], continuation: list[int]) -> float:
    """One plain forward pass for one continuation."""
    with torch.no_grad():
        logits = special.decoder.model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0]
    places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return sum(logits[place].log_softmax(-1)[token].item() for place, token in zip(places, continuation, strict=True))


def name_scores(special: SpecializedLM, request: str) -> list[float]:
    renderer = special.renderer
    prompt = renderer.user_turn([Turn(request)]) + renderer.encode_text(" Yes\nAction:")
    return [log_probability(special, prompt, renderer.encode_text(f" {name}\n")) for name in NAMES]


def test_probabilities_are_those_of_the_names(special):
    prompt = special.renderer.user_turn(TURNS)
    scorer = NameScorer(special.decoder, special.renderer, special.registry)
    found = scorer(scorer.prefill(prompt))
    expected = torch.tensor(name_scores(special, TURNS[0].request)).softmax(0)
    torch.testing.assert_close(torch.tensor(list(found.tools.values())), expected, atol=1e-3, rtol=1e-3)
    assert list(found.tools) == list(NAMES) and found.best == NAMES[int(expected.argmax())]
    yes, no = (log_probability(special, prompt, special.renderer.encode_text(word)[:1]) for word in (" Yes", " No"))
    assert found.calls_tool == pytest.approx(torch.tensor([yes, no]).softmax(0)[0].item(), abs=1e-3)


def activations(special: SpecializedLM, turns: list[Turn]) -> torch.Tensor:
    """What the FFNs hold at the two places of a conversation, with shape (places, layers, intermediate size)."""
    prompt = special.renderer.user_turn(turns)
    ids = [*prompt, *special.renderer.encode_text(" Yes\nAction:")]
    whole = capture_down_proj_inputs(special.decoder.model, WATCHED, torch.tensor([ids]))[:, 0]
    return whole[:, [len(prompt) - 1, -1]].transpose(0, 1)


def keys(special: SpecializedLM, request: str, tool: str, none: float = 10.0) -> ToolKeys:
    """Keys by which `tool` is what `request` looks like, and the others are its opposite."""
    slots = 2 * len(WATCHED)
    maps = RequestMaps(
        WATCHED,
        means=torch.zeros(slots, WIDTH),
        maps=torch.eye(WIDTH).expand(slots, WIDTH, WIDTH),
        none=torch.zeros(slots, WIDTH),
        bias=torch.tensor(none),
        scale=torch.tensor(20.0),
    )
    own, _ = maps(activations(special, [Turn(request)])[None])
    return ToolKeys(maps, torch.cat([own if name == tool else -own for name in special.registry.names]))


def updates_of(seed: int) -> DownUpdates:
    generator = torch.Generator().manual_seed(seed)
    tensors = {2: (torch.randn(2, WIDTH, generator=generator), torch.randn(HIDDEN, 2, generator=generator))}
    return DownUpdates(tensors)


def keyed(special: SpecializedLM, found: ToolKeys, updates: dict[str, DownUpdates] | None = None) -> SpecializedLM:
    parts = RegistryWeights(
        random_weights(3), found, lambda: random_weights(4), None if updates is None else updates.__getitem__
    )
    return SpecializedLM(special.edge, parts, special.registry)


@pytest.mark.parametrize("tool", ["find_all", "ruler"])
@pytest.mark.parametrize("before", [[], [Turn("Good day!", (), "Good day to you.")]])
def test_a_request_is_compared_by_its_own_activations(special, tool, before):
    """Also where most of the prompt is known from before, and where a single token is left to read."""
    found = keys(special, TURNS[0].request, tool)
    scorer = KeyScorer(special.decoder, special.renderer, special.registry, found)
    prompt = special.renderer.user_turn([*before, *TURNS])
    for _ in range(2):
        read = scorer.prefill(prompt)
        expected = activations(special, [*before, *TURNS])
        torch.testing.assert_close(read.prompt.activations, expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(read.called.activations, expected[1], atol=1e-5, rtol=1e-4)
    if not before:
        chosen = scorer(read)
        assert chosen.chosen == tool and chosen.tools[tool] > 0.99
        assert chosen.calls_tool == pytest.approx(torch.tensor(10.0).sigmoid().item(), abs=1e-3)


def test_a_request_that_no_key_is_like_calls_no_tool(special):
    scorer = KeyScorer(special.decoder, special.renderer, special.registry, keys(special, "?", "ruler", none=30.0))
    assert scorer(scorer.prefill(special.renderer.user_turn(TURNS))).chosen is None


def test_keys_choose_in_one_pass(special, monkeypatch):
    counted = []
    forward = special.decoder._forward()

    class Watched:
        cache = staticmethod(forward.cache)

        def __call__(self, ids, *arguments, **settings):
            counted.append(ids.shape[1])
            return forward(ids, *arguments, **settings)

    special.decoder.prefixes.clear()
    monkeypatch.setattr(special.decoder, "_forward", Watched)
    scorer = KeyScorer(special.decoder, special.renderer, special.registry, keys(special, "?", "ruler"))
    prompt = special.renderer.user_turn([Turn("A request that nobody has read")])
    scorer(scorer.prefill(prompt))
    assert counted == [len(prompt) + len(special.renderer.encode_text(" Yes\nAction:"))]


@pytest.mark.parametrize("tool_choice", ["auto", "any", "ruler"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_chosen_tools_updates_are_in_place(special, tool_choice, temperature):
    found = keys(special, TURNS[0].request, "ruler")
    updates = {"ruler": updates_of(1)}  # another tool's would be a KeyError
    made = keyed(special, found, updates)
    sampling = Sampling(max_tokens=60, temperature=temperature, seed=5)
    stream = made.stream(TURNS, sampling, tool_choice=tool_choice)
    text = "".join(stream)
    step = parse_step(text, made.registry)
    assert isinstance(step, ToolStep) and step.action == "ruler"
    prompt = made.renderer.user_turn(TURNS)
    by_hand = made.decoder.stream(prompt, sampling, made.grammar("ruler"), updates=updates["ruler"])
    if tool_choice == "ruler":
        assert text == "".join(by_hand)
    assert (stream.tools is None) == (tool_choice == "ruler")


def test_updates_change_what_is_written(special):
    """An update that raises the first token of a value decides between the two that the schema allows."""
    found = keys(special, TURNS[0].request, "ruler")
    rows = special.decoder.model.get_output_embeddings().weight
    for unit in ("cm", "inch"):
        raised = rows[special.renderer.encode_text(unit)[0]][:, None] * 100
        always = torch.ones(2, WIDTH) / WIDTH
        updates = {"ruler": DownUpdates({2: (always, torch.cat([raised, raised], dim=1))})}
        texts = {"".join(keyed(special, found, updates).stream(TURNS, tool_choice="any")) for _ in range(2)}
        made = keyed(special, found, updates)
        prompt = made.renderer.user_turn(TURNS)
        bare = "".join(made.decoder.stream(prompt, Sampling(), made.grammar("ruler")))
        assert len(texts) == 1
        if not texts & {bare}:
            return
    pytest.fail("neither update changes the call")


@pytest.mark.parametrize("settings", [{"grammar": False}, {"score_tools": False}])
def test_without_grammar_or_choice_the_weights_alone_carry_the_registry(special, settings):
    made = keyed(special, keys(special, TURNS[0].request, "ruler"))
    alone = SpecializedLM(special.edge, random_weights(4), special.registry)
    short = Sampling(max_tokens=12)
    stream = made.stream(TURNS, short, **settings)
    assert "".join(stream) == "".join(alone.stream(TURNS, short, **settings)) and stream.tools is None
    assert made.alone is made.alone is not made and special.alone is special


def test_without_keys_the_sum_is_merged(special):
    parts = RegistryWeights.of(random_weights(3))
    made = SpecializedLM(special.edge, parts, special.registry)
    assert "".join(made.stream(TURNS, Sampling(max_tokens=12))) == "".join(
        special.stream(TURNS, Sampling(max_tokens=12))
    )


def test_the_sum_and_updates_are_made_once_and_when_they_are_asked_for():
    made: list[str] = []
    weights = LoRAWeights(LAYERS, 1, 1.0, {})

    def combine() -> LoRAWeights:
        made.append("sum")
        return weights

    def update(tool: str) -> DownUpdates:
        made.append(tool)
        return updates_of(0)

    parts = RegistryWeights(weights, None, combine, update)
    assert not made
    assert parts.updates("a") is parts.updates("a") is not parts.updates("b")
    assert parts.combined() is parts.combined() is weights
    assert made == ["a", "b", "sum"]


def test_names_that_cannot_win_are_not_read(special, monkeypatch):
    """A name far ahead is read alone; the others are read in one more pass where they could still be as likely."""
    passes = []
    scorer = NameScorer(special.decoder, special.renderer, special.registry)
    read = scorer.prefill(special.renderer.user_turn(TURNS))
    score = special.decoder.score

    def counted(behind, names):
        passes.append(len(names))
        return score(behind, names)

    monkeypatch.setattr(special.decoder, "score", counted)
    plain = scorer(read)
    assert passes and passes[0] <= len(NAMES) - 1
    monkeypatch.setattr("loragen_agents.edge.tool_choice._MARGIN", 0.0)
    hasty = scorer(read)
    assert len(passes) <= 2 and set(hasty.tools) == set(plain.tools)


def test_the_chosen_tool_is_the_one_that_is_called(special):
    stream = special.stream(TURNS, Sampling(max_tokens=40), tool_choice="any")
    text = "".join(stream)
    assert stream.tools is not None
    step = parse_step(text, special.registry)
    assert isinstance(step, ToolStep) and step.action == stream.tools.best
    completion = stream.completion
    assert completion.text == text
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
