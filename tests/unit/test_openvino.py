"""Models on OpenVINO, held against transformers' own forward pass, and how compiled graphs are kept and shared."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.edge.decoding import Decoder, Sampling
from loragen_agents.edge.forward import Runtime
from loragen_agents.edge.lean_forward import LeanForward
from loragen_agents.edge.module_forward import ModuleForward
from loragen_agents.edge.specialized import merged_decoder
from loragen_agents.errors import ModelLoadError
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.models.runtimes import chosen_runtime
from tests.openvino_alone import OpenVINOAlone
from tests.tiny_models import SIZES, tiny_model, tiny_tokenizer

pytest.importorskip("openvino")

from loragen_agents.edge.openvino import compiled
from loragen_agents.edge.openvino.forward import OpenVINOForward, padded
from loragen_agents.edge.openvino.graph import why_not
from loragen_agents.edge.openvino.quantise import GROUP
from loragen_agents.edge.openvino.standalone import save_standalone

TOKENIZER = tiny_tokenizer()
FAMILIES = ["llama", "qwen", "qwen3", "gemma", "gemma1", "mistral_window"]


def family_model(family: str, **sizes: Any) -> PreTrainedModel:
    """A tiny model of each architecture that has a graph; windows are shorter than what the tests read."""
    if family in ("llama", "qwen") and not sizes:
        return tiny_model(family)
    every = {**SIZES, "vocab_size": len(TOKENIZER), "num_key_value_heads": 2, **sizes}
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "gemma":
        model = tiny_model(family)
        model.config.sliding_window = 5
        for layer in model.model.layers:  # type: ignore[union-attr]
            if layer.self_attn.sliding_window is not None:  # type: ignore[union-attr]
                layer.self_attn.sliding_window = 5  # type: ignore[union-attr]
        return model
    if family == "gemma1":
        model = GemmaForCausalLM(GemmaConfig(**every, head_dim=8))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**every, head_dim=8))
    else:
        model = MistralForCausalLM(MistralConfig(**every, sliding_window=5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            elif "norm" in name:
                parameter.normal_()
    return model.eval()


def differences(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits by OpenVINO less the model's own, and those; for rows that are fed one, several or no tokens at a time."""
    ids = torch.randint(3, len(TOKENIZER), (2, 20), generator=torch.Generator().manual_seed(1))
    forward = Runtime(model, "openvino").bind()
    assert isinstance(forward, OpenVINOForward)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    with torch.inference_mode():
        expected = model(ids).logits.float()
        cache = forward.cache(2)
        for counts in [(9, 1), (1, 1), (0, 4), (5, 7), (1, 1), (4, 0)]:
            width = max(counts)
            fed = torch.zeros(2, width, dtype=torch.long)
            for row, count in enumerate(counts):
                fed[row, :count] = ids[row, cache.lengths[row] : cache.lengths[row] + count]
            logits = forward(fed, cache, torch.arange(width).expand(2, -1))
            for row, count in enumerate(counts):
                found.append(logits[row, :count])
                wanted.append(expected[row, cache.lengths[row] : cache.lengths[row] + count])
            cache.advance(counts)
    assert cache.lengths == [20, 14]
    return torch.cat(found) - torch.cat(wanted), torch.cat(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-5 with matrices in float32, and with int8 to a tenth of their spread."""
    model = family_model(family)
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
    difference, _ = differences(model)
    assert difference.abs().max() < 1e-5
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "int8")
    difference, logits = differences(model)
    assert 0 < difference.std() < 0.1 * logits.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_standalone_logits_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a padded row beside a whole one, with a part of the prompt in the states."""
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
    model = family_model(family)
    save_standalone(model, tmp_path / "openvino_model.xml")
    alone = OpenVINOAlone(tmp_path)
    ids = torch.randint(3, len(TOKENIZER), (2, 12), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[1, :3] = 0
    run: Any = model
    with torch.inference_mode():
        positions = (attended.cumsum(dim=1) - 1).clamp(min=0)
        expected = run(ids, attention_mask=attended, position_ids=positions).logits
    for begin, end in ((0, 8), (8, 9), (9, 12)):
        found = torch.from_numpy(alone.logits(ids[:, begin:end].numpy(), attended[:, :end].numpy()))
        torch.testing.assert_close(found, expected[:, end - 1], atol=1e-4, rtol=1e-4)


def test_four_bits_follow_the_model_more_loosely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "int4")
    model = tiny_model("llama")
    assert model.config.hidden_size % GROUP == 0
    difference, logits = differences(model)
    assert 0 < difference.std() < logits.std()


def test_another_quantisation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "int7")
    with pytest.raises(ModelLoadError, match="LORAGEN_AGENTS_QUANTISATION is 'int7'; expected int8, int4 or none"):
        Decoder(tiny_model("llama"), TOKENIZER, runtime="openvino")


def test_which_models_have_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    assert all(why_not(family_model(family)) is None for family in FAMILIES)
    hooked = tiny_model("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: None)  # type: ignore[union-attr]
    assert "hooks" in (why_not(hooked) or "")
    chunked = tiny_model("gemma")
    chunked.config.layer_types[0] = "chunked_attention"
    assert "chunked_attention" in (why_not(chunked) or "")
    # PyTorch runs what has no graph, and says so.
    with caplog.at_level(logging.WARNING):
        assert isinstance(Runtime(hooked, "openvino").bind(), ModuleForward)
    assert "wrapped or have hooks" in caplog.text


def test_a_runtime_is_chosen_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", "openvino")
    assert (chosen_runtime(), chosen_runtime("torch")) == ("openvino", "torch")
    monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", "onnx")
    with pytest.raises(ModelLoadError, match="no runtime 'onnx'; expected auto, openvino, torch"):
        chosen_runtime()
    monkeypatch.setattr("loragen_agents.models.runtimes.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install openvino"):
        chosen_runtime("openvino")


@pytest.mark.parametrize("said", [None, "", "auto"])
def test_the_default_is_openvino_where_it_has_a_graph(
    said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("LORAGEN_AGENTS_RUNTIME")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    if said is not None:
        monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", said)
    runtime = Runtime(tiny_model())
    assert (runtime.name, runtime.exact) == ("openvino", False)
    assert isinstance(runtime.bind(), OpenVINOForward)
    # Nobody asked for OpenVINO by name, so it is no warning that PyTorch runs a model.
    hooked = tiny_model("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: None)  # type: ignore[union-attr]
    runtime = Runtime(hooked)
    with caplog.at_level(logging.INFO):
        assert isinstance(runtime.bind(), ModuleForward)
    assert (runtime.name, runtime.exact) == ("torch", True)
    assert [record.levelname for record in caplog.records if "not OpenVINO" in record.message] == ["INFO"]
    monkeypatch.setattr("loragen_agents.models.runtimes.find_spec", lambda name: None)
    assert Runtime(tiny_model()).name == "torch"


def some_weights() -> LoRAWeights:
    random = torch.Generator().manual_seed(0)
    a = torch.randn(1, SIZES["intermediate_size"], generator=random)
    b = torch.randn(SIZES["hidden_size"], 1, generator=random)
    return LoRAWeights(SIZES["num_hidden_layers"], 1, 1.0, {(0, "down_proj"): (a, b)})


def test_a_model_of_one_registry_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAGEN_AGENTS_RUNTIME")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    edge = LanguageModel("tiny", Path("tiny"), tiny_model(), TOKENIZER, "fingerprint")
    weights = some_weights()
    assert isinstance(merged_decoder(edge, weights, for_one=True)._forward(), LeanForward)
    assert isinstance(merged_decoder(edge, weights)._forward(), OpenVINOForward)
    monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", "openvino")
    assert isinstance(merged_decoder(edge, weights, for_one=True)._forward(), OpenVINOForward)


def test_on_other_cpus_openvino_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAGEN_AGENTS_RUNTIME")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert Runtime(tiny_model()).name == "torch"
    assert Runtime(tiny_model(), "openvino").name == "openvino"


def test_models_with_equal_weights_share_a_graph() -> None:
    one, same, other = (Runtime(tiny_model(seed=seed), "openvino").bind() for seed in (0, 0, 1))
    assert isinstance(one, OpenVINOForward) and isinstance(same, OpenVINOForward) and isinstance(other, OpenVINOForward)
    assert one.compiled is same.compiled is not other.compiled


def test_merged_weights_are_in_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits as PyTorch gives with a merged copy, and nothing but the graph holds the weights afterwards."""
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
    edge = LanguageModel("tiny", Path("tiny"), tiny_model(), TOKENIZER, "fingerprint")
    logits = {}
    for runtime in ("torch", "openvino"):
        monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", runtime)
        decoder = merged_decoder(edge, some_weights())
        logits[runtime] = decoder.prefill([5, 6, 7]).logits
        shared = {id(parameter) for parameter in edge.model.parameters()}
        own = [name for name, parameter in decoder.model.named_parameters() if id(parameter) not in shared]
        assert own == ([] if runtime == "openvino" else ["model.layers.0.mlp.down_proj.weight"])
    torch.testing.assert_close(logits["openvino"], logits["torch"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits["torch"], merged_decoder(edge, None).prefill([5, 6, 7]).logits, atol=1e-3)
    # Where a graph can no longer be written, PyTorch runs the merged model.
    decoder.model.model.layers[0].mlp.register_forward_hook(lambda *given: None)  # type: ignore[union-attr]
    torch.testing.assert_close(decoder.prefill([5, 6, 7]).logits, logits["torch"], atol=1e-5, rtol=1e-4)
    other = LoRAWeights(SIZES["num_hidden_layers"] + 1, 1, 1.0, some_weights().tensors)
    with pytest.raises(ValueError, match="layers"):
        merged_decoder(edge, other)


def test_weights_that_were_changed_have_a_graph_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a fingerprint says that they are those of a file."""
    monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", "openvino")
    model = tiny_model()
    first = Runtime(model, fingerprint="file").bind()
    assert isinstance(first, OpenVINOForward)
    assert Runtime(tiny_model(), fingerprint="file").bind().compiled is first.compiled  # type: ignore[attr-defined]
    some_weights().merge_into(model)
    assert Runtime(model, fingerprint="file").bind().compiled is not first.compiled  # type: ignore[attr-defined]


def test_a_compiled_graph_is_kept_on_disk(nothing_is_fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_SMALLEST_KEPT", 0)
    prompt, sampling = [5, 6, 7], Sampling(max_tokens=8)

    def tokens() -> tuple[int, ...]:
        monkeypatch.setattr(compiled, "_compiled", {})
        return Decoder(tiny_model(), TOKENIZER, runtime="openvino").generate([prompt], sampling)[0].token_ids

    expected = tokens()
    (file,) = (nothing_is_fetched / "openvino").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "write_graph", None)
        assert tokens() == expected
    # What is damaged is made again.
    file.write_bytes(file.read_bytes()[:1000])
    assert tokens() == expected
    assert file.stat().st_size > 1000
    # The least recently used go.
    monkeypatch.setattr(compiled, "_KEPT_FILES", 1)
    Runtime(tiny_model(seed=1), "openvino").bind()
    assert len(list(file.parent.iterdir())) == 1 and not file.exists()


def test_a_cache_folder_that_cannot_be_written_stops_nothing(
    nothing_is_fetched: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_SMALLEST_KEPT", 0)
    monkeypatch.setattr(compiled, "_compiled", {})
    (nothing_is_fetched / "openvino").write_text("in the way")
    assert Decoder(tiny_model(), TOKENIZER, runtime="openvino").generate([[5]], Sampling(max_tokens=2))
    assert "can't be kept" in caplog.text


def read(forward: Any, cache: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = forward(torch.tensor([tokens]), cache, torch.tensor([[len(tokens) - 1]]))[0, 0]
    cache.advance([len(tokens)])
    return logits


def test_requests_of_all_lengths_need_few_widths() -> None:
    """Padding adds few tokens, and none to a single one, as each step of decoding reads it."""
    widths = [padded(width) for width in range(1, 513)]
    assert widths[:4] == [1, 2, 4, 4] and len(set(widths)) < 45
    assert all(width <= wide <= max(width + 3, 1.15 * width) for width, wide in enumerate(widths, start=1))


def test_a_request_that_ended_is_used_again() -> None:
    forward = Runtime(tiny_model(), "openvino").bind()
    first: Any = forward.cache(1)
    request = first.lease.request
    fresh = read(forward, first, [5, 6])
    del first
    second: Any = forward.cache(1)
    assert torch.equal(read(forward, second, [5, 6]), fresh)
    assert second.lease.request is request


def test_values_are_looked_at_without_taking_the_states_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
    forward = Runtime(tiny_model(), "openvino").bind()
    cache: Any = forward.cache(1)
    read(forward, cache, [5, 6, 7, 8])
    snapshot = cache.snapshot(0)
    seen = snapshot.values([0, 1])
    assert snapshot.held is not None
    read(forward, cache, [9])
    for layer, values in enumerate(seen):
        torch.testing.assert_close(values, snapshot.layers[layer][1, 0])


def test_what_was_read_is_continued_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several continuations one after another go on in one request; two at a time do not see each other."""
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
    forward = Runtime(tiny_model(), "openvino").bind()

    def fresh(tokens: list[int]) -> Tensor:
        return read(forward, forward.cache(1), tokens)

    def continued(snapshot: Any, length: int) -> Any:
        cache = forward.cache(1)
        cache.fill([snapshot], [length])
        return cache

    begun: Any = forward.cache(1)
    read(forward, begun, [5, 6, 7, 8])
    lease, snapshot = begun.lease, begun.snapshot(0)
    # The one who read it is still at work there: this is a copy.
    other = continued(snapshot, 4)
    assert other.lease is not lease
    torch.testing.assert_close(read(forward, other, [9]), fresh([5, 6, 7, 8, 9]))
    begun_again: Any = forward.cache(1)
    read(forward, begun_again, [5, 6, 7, 8])
    lease, snapshot = begun_again.lease, begun_again.snapshot(0)
    del begun_again
    for length, further in ((4, [10, 11]), (4, [12]), (2, [13, 14, 15])):
        cache = continued(snapshot.first(length), length)
        assert cache.lease is lease and cache.slots >= 4
        torch.testing.assert_close(read(forward, cache, further), fresh([*[5, 6, 7, 8][:length], *further]))
        after = cache.snapshot(0)
        del cache
    last = continued(after, 5)
    assert last.lease is lease
    torch.testing.assert_close(read(forward, last, [16]), fresh([5, 6, 13, 14, 15, 16]))
    # Copied out of the request, past the slots that do not count, it is the same.
    layers = last.snapshot(0).layers
    assert layers[0].shape[3] == 6
    torch.testing.assert_close(layers[0], _states(forward, [5, 6, 13, 14, 15, 16])[0], atol=1e-5, rtol=1e-5)


def _states(forward: Any, tokens: list[int]) -> tuple[Tensor, ...]:
    cache = forward.cache(1)
    read(forward, cache, tokens)
    layers: tuple[Tensor, ...] = cache.snapshot(0).layers
    return layers
