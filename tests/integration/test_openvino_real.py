"""The embedded model on OpenVINO: as precise as int8 can be, and the same calls through the chat model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loragen_agents import LoRAGenChatModel
from loragen_agents.edge.forward import Runtime
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.specialize import forget_specializations
from loragen_agents.support.content import content_folder

pytest.importorskip("openvino")

pytestmark = pytest.mark.integration
TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def in_float32() -> Iterator[LanguageModel]:
    yield load_language_model("smollm2-135m-instruct", dtype="float32")


def test_int8_says_nearly_what_float32_says(in_float32: LanguageModel) -> None:
    """Over 200 tokens: how far the distributions differ, and the likeliest token where it leads by a tenth."""
    ids = torch.tensor([in_float32.tokenizer.encode(TEXT)[:200]])
    keep = torch.arange(200)[None]
    logits = {}
    with torch.inference_mode():
        for runtime in ("torch", "openvino"):
            forward = Runtime(in_float32.model, runtime).bind()  # type: ignore[arg-type]
            logits[runtime] = forward(ids, forward.cache(1), keep)[0].float().log_softmax(dim=-1)
    expected, found = logits["torch"], logits["openvino"]
    divergence = (expected.exp() * (expected - found)).sum(dim=-1).mean()
    assert 0 < divergence < 0.02
    leading = expected.exp().topk(2, dim=-1).values
    clear = leading[:, 0] - leading[:, 1] > 0.1
    assert clear.float().mean() > 0.5
    same = expected.argmax(dim=-1) == found.argmax(dim=-1)
    assert same[clear].float().mean() > 0.97


def test_the_chat_model_calls_the_same_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = ("What colour is the car in image/a.png?", "Draw a cat on a red sofa.", "Good morning! How are you?")
    every = ToolRegistry.from_yaml(content_folder("tools") / "gpt4tools_seen.yaml")
    registry = ToolRegistry(list(every)[:4], input_format=every.input_format)
    calls = {}
    for runtime in ("torch", "openvino"):
        monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", runtime)
        forget_specializations()  # a decoder keeps its runtime
        model = LoRAGenChatModel(tools=registry, max_tokens=48, specialization_cache=False)
        calls[runtime] = [[call["name"] for call in model.invoke(request).tool_calls] for request in requests]
    assert calls["torch"] == calls["openvino"]
    assert calls["torch"][0] and calls["torch"][1]
