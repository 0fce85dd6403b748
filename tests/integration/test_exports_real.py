"""Exports of the embedded model write what it writes itself: in peft, transformers, llama.cpp and OpenVINO."""

from importlib.util import find_spec

from loragen_agents.commands.options import load_registry
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import load_language_model
from loragen_agents.registry import ToolRegistry
from tests.compare_exports import compare

REQUESTS = ("Convert 5 miles to kilometres", "What is 17 times 23?", "Thank you, that was all.")


def test_exports_write_the_same_text(tmp_path):
    edge = load_language_model(dtype="float32")
    generator = LoRAGenerator.load("default", cloud=edge, edge=edge)
    # Few tools: the weights alone, without scores and grammar, tell some two dozen apart at most.
    assistant = load_registry("assistant")
    registry = ToolRegistry([assistant[name] for name in ("calculator", "convert_units", "take_note", "read_file")])
    forms = ["peft", "gguf", "merged", *(["openvino"] if find_spec("openvino") else [])]
    pairs = compare(edge, generator, [(registry, REQUESTS)], tmp_path, forms=forms, max_tokens=24)
    for form, both in pairs.items():
        for ours, theirs in both:
            assert theirs == ours, form
    assert any("Action: convert_units" in ours for ours, _ in pairs["gguf"])
