"""The embedded model specialised on real registries: what it costs, and that registries keep apart in threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loragen_agents.conversation.prompts import Turn
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.registry import ToolRegistry
from loragen_agents.support.content import content_folder

pytestmark = pytest.mark.integration

TURNS = [Turn("What is 2 + 3?")]


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return load_language_model()


@pytest.fixture(scope="module")
def generator(language_model: LanguageModel) -> LoRAGenerator:
    """A generator in which everything has moved, so that no merge is left out as zero."""
    torch.manual_seed(0)
    made = LoRAGenerator(GeneratorConfig(), language_model, language_model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B" in name or name.startswith("producer.b"):
                parameter.normal_(std=0.01)
    return made


@pytest.fixture(scope="module")
def registries() -> list[ToolRegistry]:
    names = ("gpt4tools_seen", "gpt4tools_unseen")
    return [ToolRegistry.from_yaml(content_folder("tools") / f"{name}.yaml") for name in names]


def test_specialising_costs_at_most_half_more_than_a_prefill(language_model, generator, registries):
    registry = ToolRegistry([tool for one in registries for tool in one], input_format="csv")
    renderer = SpecializedLM(language_model, None, registry).renderer

    def prefill() -> None:
        ids = torch.tensor([generator.encode(renderer.definitions(registry))])
        with torch.no_grad():
            language_model.model(ids, logits_to_keep=1)

    def specialise() -> None:
        weights = generator.generate(renderer.definitions(registry), registry)
        SpecializedLM(language_model, weights, registry)

    def cpu_seconds(task) -> float:
        started = time.process_time()
        task()
        return time.process_time() - started

    # Seconds of one thread: what the work costs, whatever else the machine is doing.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        specialise()
        pairs = [(cpu_seconds(prefill), cpu_seconds(specialise)) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert len(registry) == 29
    assert min(pair[1] for pair in pairs) <= 1.5 * min(pair[0] for pair in pairs), pairs


def test_registries_in_threads_give_what_they_give_one_after_the_other(language_model, generator, registries):
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        before = language_model.model(ids).logits
    models = [SpecializedLM(language_model, generator.generate(" ".join(one.names)), one) for one in registries]

    def step(model: SpecializedLM) -> list[tuple[int, ...]]:
        # A call of some tool differs for certain: the two registries have no name in common.
        streams = [
            model.stream(TURNS, Sampling(max_tokens=12), grammar=held, tool_choice="any") for held in (False, True)
        ]
        for stream in streams:
            for _ in stream:
                pass
        return [stream.completion.token_ids for stream in streams]

    expected = [step(model) for model in models]
    assert expected[0] != expected[1]
    start = threading.Barrier(2)

    def serve(model: SpecializedLM) -> list[tuple[int, ...]]:
        start.wait()
        return step(model)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, models)) == expected
    with torch.no_grad():
        assert torch.equal(language_model.model(ids).logits, before)
