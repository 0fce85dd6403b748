"""Texts that a decoder's forward pass reads for the generator, held against what transformers' modules read."""

import pytest
import torch

from loragen_agents.edge.decoding import Decoder
from loragen_agents.edge.reading import PassReader
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.generator.argument_head import read_values
from loragen_agents.generator.tool_reading import captured_at
from loragen_agents.registry import Tool, ToolRegistry
from loragen_agents.specialization.specialize import forget_specializations, specialize
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.unit.test_specialized import language_model

# Of different lengths, with a beginning that all share; places differ in number.
ROWS = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [5, 6, 11, 12, 13, 14, 15]]
PLACES = [[2, 4], [3], [2, 3, 6]]


@pytest.mark.parametrize("most", [1, 12, 1000])
@pytest.mark.parametrize("count", [1, 3])
def test_texts_are_read_as_modules_read_them(
    runtime: str, most: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they run together or alone, in one pass or in several, and whatever they begin with."""
    monkeypatch.setattr("loragen_agents.edge.reading._MOST_TOKENS", most)
    model = tiny_model()
    reader = PassReader(Decoder(model, tiny_tokenizer()))
    rows = list(zip(ROWS[:count], PLACES[:count], strict=True))
    for found, wanted in zip(reader.activations([2], rows), captured_at(model, [2], rows), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    for found, wanted in zip(
        reader.values([0, 2], ROWS[:count]), read_values(model, [0, 2], ROWS[:count]), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert reader.activations([2], []) == [] == reader.values([0], [])


def test_openvino_reads_tools_too(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a registry becomes is the same on both runtimes, and where OpenVINO runs the model, no module does."""
    edge = language_model()
    config = GeneratorConfig(
        n_experts=1, rank=2, head_layers=1, head_width=4, memory_layers=1, argument_layers=1, argument_width=4,
        argument_hidden=4,
    )  # fmt: skip
    torch.manual_seed(0)
    generator = LoRAGenerator(config, None, edge)
    with torch.no_grad():
        for tensor in generator.own_tensors().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) / 10)
    schema = {"type": "object", "properties": {"place": {"type": "string"}}}
    registry = ToolRegistry([Tool(name="find", description="Finds a place.", parameters=schema)])
    wanted = generator.generate_parts("", registry)
    keys, given, updates = wanted.keys, wanted.arguments("find"), wanted.updates("find")
    for part in (generator.tool_head, generator.tool_memory):
        part.forget()  # type: ignore[union-attr]
    if runtime == "openvino":
        for module in ("tool_head", "tool_reading"):
            monkeypatch.setattr(f"loragen_agents.generator.{module}.captured_at", None)
        monkeypatch.setattr("loragen_agents.generator.argument_head.read_values", None)
    try:
        found = specialize(registry, edge=edge, cloud=edge, generator=generator).parts
        torch.testing.assert_close(found.keys.vectors, keys.vectors, atol=1e-3, rtol=1e-3)  # type: ignore[union-attr]
        torch.testing.assert_close(
            found.arguments("find").vectors, given.vectors, atol=1e-4, rtol=1e-3  # type: ignore[union-attr]
        )  # fmt: skip
        for layer, pair in updates.tensors.items():  # type: ignore[union-attr]
            for one, other in zip(found.updates("find").tensors[layer], pair, strict=True):  # type: ignore[union-attr]
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    finally:
        forget_specializations()
