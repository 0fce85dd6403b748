"""Generated weights as a PEFT folder: what PEFT alone makes of it is what the merged model computes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers, load_language_model

pytestmark = pytest.mark.integration

PROMPT = "The capital of France is"
# Runs with transformers and peft alone.
PEFT_ALONE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
ids = torch.tensor([tokenizer(prompt).input_ids])
new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
print(json.dumps([new[0].tolist(), "loragen_agents" in sys.modules]))
"""


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return load_language_model(dtype="float32")


@pytest.fixture(scope="module")
def weights(language_model: LanguageModel) -> LoRAWeights:
    """Weights out of a generator whose experts have moved, with two rank-one updates more in some layers."""
    torch.manual_seed(0)
    generator = LoRAGenerator(GeneratorConfig(), language_model, language_model)
    with torch.no_grad():
        for name, parameter in generator.producer.named_parameters():
            if name.startswith("b."):
                parameter.normal_(std=0.06)
    shape = generator.shape
    updates = {
        (layer, "down_proj"): (torch.randn(2, shape.intermediate) / 40, torch.randn(shape.hidden, 2) / 24)
        for layer in range(20, shape.layers)
    }
    return generator.generate("calculator: works out a sum").concatenate(LoRAWeights(shape.layers, 1, 2.0, updates))


@pytest.fixture(scope="module")
def folder(language_model: LanguageModel, weights: LoRAWeights, tmp_path_factory) -> Path:
    paths = [path for path, _ in gated_ffn_layers(language_model.model)]
    return weights.save_peft(tmp_path_factory.mktemp("adapter"), language_model.name, paths)


def test_peft_gives_the_logits_of_the_merged_model(language_model, weights, folder):
    ids = torch.tensor([language_model.tokenizer(PROMPT).input_ids])
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(language_model.folder, dtype=torch.float32), folder
    ).eval()
    with torch.no_grad():
        bare = language_model.model(ids).logits
        peft = adapted(ids).logits
        with weights.merge_into(language_model.model) as merged:
            assert merged.matrices == 90
            ours = language_model.model(ids).logits
        assert torch.equal(language_model.model(ids).logits, bare)
    torch.testing.assert_close(ours, peft, rtol=1e-3, atol=1e-3)
    assert (ours - bare).abs().max() > 1


def test_the_folder_comes_back_as_it_went(weights, folder):
    back = LoRAWeights.load_peft(folder)
    assert (back.layers, back.rank, back.alpha, back.entries) == (30, 16, 16, weights.entries)
    assert back.tensors[25, "down_proj"][0].shape[0] == 18
    for entry in weights.entries:
        assert all(torch.equal(x, y) for x, y in zip(back.tensors[entry], weights.tensors[entry], strict=True))


def test_a_process_without_this_package_writes_the_same_text(language_model, weights, folder, tmp_path):
    ids = torch.tensor([language_model.tokenizer(PROMPT).input_ids])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    with weights.merge_into(language_model.model):
        generate: Any = language_model.model.generate
        ours = generate(input_ids=ids, **options)[0].tolist()
    command = [sys.executable, "-I", "-c", PEFT_ALONE, str(language_model.folder), str(folder), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, timeout=300)
    theirs, imported = json.loads(done.stdout.splitlines()[-1])
    assert theirs == ours and not imported
