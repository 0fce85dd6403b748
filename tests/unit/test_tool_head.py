"""The tool head: its formula, what it reads of tools, and what a generator keeps of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.generator import tool_head as tool_head_module
from loragen_agents.generator.tool_head import ToolHead, ToolIndexer, request_row
from loragen_agents.generator.tool_reading import capture_down_proj_inputs
from loragen_agents.generator.tool_texts import TextKind, as_request, in_words, request_texts
from loragen_agents.registry import Tool, ToolRegistry
from tests.tiny_models import SIZES, tiny_tokenizer
from tests.unit.test_specialized import language_model

LAYERS, WIDTH, INTERMEDIATE = (1, 2), 5, SIZES["intermediate_size"]
SLOTS = 2 * len(LAYERS)
UNITS = {"type": "object", "properties": {"unit": {"enum": ["cm", "inch"]}, "length": {"type": "number"}}}
RULER = Tool(name="ruleLength", description="Measure the length of things.", parameters=UNITS)
DATE = Tool(name="date", description="Tells the date.")
MAIL = Tool(name="send_mail", description="Sends a letter.")
NOTHING = LoRAWeights(SIZES["num_hidden_layers"], 1, 1.0, {})


def head(seed: int = 0, intermediate: int = INTERMEDIATE) -> ToolHead:
    torch.manual_seed(seed)
    made = ToolHead(LAYERS, intermediate, WIDTH)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.add_(torch.randn_like(tensor) / 10)
    return made


def test_a_tool_reads_as_three_requests() -> None:
    assert request_texts(RULER) == {
        TextKind.DESCRIPTION: "Please measure the length of things.",
        TextKind.NAME: "Please rule length.",
        TextKind.ARGUMENTS: "Please measure the length of things. With unit (cm, inch), length.",
    }
    assert request_texts(DATE).keys() == {TextKind.DESCRIPTION, TextKind.NAME}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("getHTTPStatus_code", "get http status code"),
        ("files.read-all", "files read all"),
        ("turn_on_light2", "turn on light 2"),
        ("日期", "日期"),
    ],
)
def test_names_in_words(name: str, words: str) -> None:
    assert in_words(name) == words


def test_a_description_reads_as_a_request() -> None:
    assert as_request("PDF files\nare  read.") == "Please PDF files are read."
    assert as_request("Reads " + "very " * 100, 20) == "Please reads very very very."
    values = {"type": "array", "items": {"enum": list(range(20))}, "description": "unused"}
    noted = Tool(name="n", description="Do.", parameters={"type": "object", "properties": {"a": values, "b": True}})
    assert request_texts(noted)[TextKind.ARGUMENTS] == "Please do. With a (0, 1, 2, 3, 4, 5, 6, 7), b."


def test_vectors_follow_the_formula() -> None:
    made = head()
    x = torch.randn(2, len(TextKind), SLOTS, INTERMEDIATE)
    present = torch.tensor([[True, True, True], [True, False, False]])
    found = made.vectors(x, present)

    def one(tool: int, kind: int) -> torch.Tensor:
        parts = [
            F.normalize(x[tool, kind, slot] - made.tool_mean[kind, slot], dim=0) @ made.tool_map[slot]
            for slot in range(SLOTS)
        ]
        return F.normalize(torch.cat(parts), dim=0)

    shares = made.text_weights.softmax(dim=0)
    both = torch.stack([shares[kind] * one(0, kind) for kind in range(len(TextKind))]).sum(dim=0)
    torch.testing.assert_close(found[0], both / both.norm())
    torch.testing.assert_close(found[1], one(1, 0))


def test_a_requests_logits_follow_the_formula() -> None:
    made = head()
    keys = ToolIndexer(language_model(), made).keys(F.normalize(torch.randn(4, SLOTS * WIDTH), dim=-1))
    x = torch.randn(3, 2, len(LAYERS), INTERMEDIATE)
    found = keys.logits(x)
    centred = F.normalize(x.flatten(1, 2) - made.request_mean, dim=-1)
    request = F.normalize(torch.einsum("rsi,siw->rsw", centred, made.request_map).flatten(1), dim=-1)
    torch.testing.assert_close(found[:, :-1], made.log_scale.exp() * request @ keys.vectors.T)
    torch.testing.assert_close(found[:, -1], made.none_bias + (centred * made.none).sum(dim=(1, 2)))


def test_what_was_learnt_on_directions_holds_for_activations() -> None:
    small, x = head(intermediate=6), torch.randn(7, SLOTS, INTERMEDIATE)
    basis = torch.linalg.qr(torch.randn(SLOTS, INTERMEDIATE, 6))[0]
    means = torch.randn(1 + len(TextKind), SLOTS, INTERMEDIATE)
    full = small.in_full(basis, means[-1], means[:-1])
    centred = F.normalize(x - means[-1], dim=-1)
    expected = small.request_vectors(torch.einsum("rsi,sik->rsk", centred, basis))
    for one, other in zip(full.maps()(x.view(7, 2, len(LAYERS), INTERMEDIATE)), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_tools_are_read_as_requests_are() -> None:
    """A tool whose only text is a request's words has the activations of that request."""
    edge, made = language_model(), head()
    made.text_weights.data = torch.tensor([0.0, -1e4, -1e4])
    made.tool_map.data.copy_(made.request_map)
    made.tool_mean[TextKind.DESCRIPTION] = made.request_mean
    indexer = ToolIndexer(edge, made)
    keys = indexer(ToolRegistry([DATE, MAIL]), NOTHING)
    ids, places = request_row(PromptRenderer(tiny_tokenizer()), Turn("Please sends a letter."))
    x = capture_down_proj_inputs(edge.model, LAYERS, torch.tensor([ids]))[:, 0, places].transpose(0, 1)
    torch.testing.assert_close(made.maps()(x[None])[0][0], keys.vectors[1], atol=1e-3, rtol=1e-2)


def test_a_registry_grows_by_a_tool_without_touching_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    indexer = ToolIndexer(language_model(), head(), keep=4)
    read: list[int] = []
    captured = tool_head_module.captured_at

    def counted(model, layers, rows):  # type: ignore[no-untyped-def]
        read.append(len(rows))
        return captured(model, layers, rows)

    monkeypatch.setattr(tool_head_module, "captured_at", counted)
    two = indexer(ToolRegistry([RULER, DATE]), NOTHING).vectors
    three = indexer(ToolRegistry([MAIL, RULER, DATE]), NOTHING).vectors
    assert read == [5, 2] and torch.equal(three[1:], two)
    torch.testing.assert_close(
        three, ToolIndexer(language_model(), head())(ToolRegistry([MAIL, RULER, DATE]), NOTHING).vectors
    )
    indexer.train()
    indexer(ToolRegistry([DATE]), NOTHING)
    assert read[-1] == 2, "after training nothing that was read is valid any more"


CONFIG = GeneratorConfig(
    n_experts=1,
    expert_scope="per_layer",
    rank=2,
    memory_layers=2,
    memory_common_rank=4,
    head_layers=2,
    head_width=WIDTH,
)


def generator(config: GeneratorConfig = CONFIG) -> LoRAGenerator:
    torch.manual_seed(0)
    made = LoRAGenerator(config, language_model("qwen", torch.float32), language_model())
    with torch.no_grad():
        for name, tensor in made.own_tensors().items():
            if name.startswith(("producer", "tool_head")) and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) / 10)
    return made


def test_a_checkpoint_carries_the_head(tmp_path) -> None:
    made, registry = generator(), ToolRegistry([RULER, DATE])
    loaded = LoRAGenerator.load(made.save(tmp_path), None, made.edge)
    assert loaded.config == CONFIG and loaded.fingerprint == made.fingerprint
    one, other = (each.generate_parts("", registry).keys for each in (made, loaded))
    assert one is not None and other is not None
    torch.testing.assert_close(one.vectors, other.vectors)


def test_a_tools_own_updates_are_those_of_a_registry_of_its_own() -> None:
    made, registry = generator(), ToolRegistry([RULER, DATE, MAIL])
    parts = made.generate_parts("", registry)
    alone = made.generate("", ToolRegistry([RULER]))
    updates = parts.updates("ruleLength")
    assert updates is not None and updates.tensors.keys() == {1, 2}
    shared = parts.shared
    for layer, (a, b) in updates.tensors.items():
        torch.testing.assert_close(shared.update(layer, "down_proj") + b @ a, alone.update(layer, "down_proj"))
    assert parts.combined().tensors.keys() == made.generate("", registry).tensors.keys()


def test_what_is_shared_is_the_same_object_until_the_weights_change() -> None:
    made = generator()
    first = made.generate_parts("", ToolRegistry([RULER])).shared
    assert made.generate_parts("other", ToolRegistry([DATE])).shared is first
    with torch.no_grad():
        next(made.producer.parameters()).add_(1)
    assert made.generate_parts("", ToolRegistry([RULER])).shared is not first


def test_routed_experts_have_a_head_too() -> None:
    made = generator(replace(CONFIG, n_experts=4))
    registry = ToolRegistry([RULER, DATE])
    one, other = made.generate_parts("a b", registry), made.generate_parts("c", registry)
    assert one.keys is not None and other.keys is not None
    assert not torch.equal(one.shared.update(1, "up_proj"), other.shared.update(1, "up_proj"))
    assert not torch.allclose(one.keys.vectors, other.keys.vectors), "tools are read beside the weights at hand"


def test_known_vectors_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, registry = generator(), ToolRegistry([RULER, DATE])
    keys = made.generate_parts("", registry).keys
    assert keys is not None and made.tool_head is not None
    monkeypatch.setattr(made.tool_head, "forward", lambda *given: pytest.fail("tools were read"))
    again = made.generate_parts("", registry, vectors=keys.vectors).keys
    assert again is not None and torch.equal(again.vectors, keys.vectors)


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match="head_layers is 4, and the edge LM has 3 layers"):
        generator(replace(CONFIG, head_layers=4))
