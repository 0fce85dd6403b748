"""The embedded default: fetched, checked and converted by the code that users run."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loragen_agents import cli
from loragen_agents.models.cache import obtain_model
from loragen_agents.models.language_models import DEFAULT_MODEL, LanguageModel, gated_ffn_layers, load_language_model
from loragen_agents.support.progress import silent


def test_its_weights_are_those_that_generators_are_trained_for(embedded_model: LanguageModel) -> None:
    # Another release of transformers or gguf that unpacks the file differently would show here.
    assert embedded_model.fingerprint == "4e12bc606819dddc3a77728fa3e0969fe2ddff8abc986259e6fc3ed83f1db9f7"
    assert embedded_model.name == DEFAULT_MODEL
    assert len(gated_ffn_layers(embedded_model.model)) == 30


def test_the_tokenizer_has_the_special_tokens_of_the_original(embedded_model: LanguageModel) -> None:
    tokenizer: Any = embedded_model.tokenizer
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert embedded_model.model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer("hello").input_ids == [28120]
    assert 2 not in tokenizer("<|im_end|>", split_special_tokens=True).input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # As llama.cpp splits them, which reads the same file.
        ("a  17", ["a", "ĠĠ", "1", "7"]),
        ("x\n\n1. one", ["x", "ĊĊ", "1", ".", "Ġone"]),
        ("def f(x):\n    1 + 22\n\t3", ["def", "Ġf", "(", "x", "):", "ĊĠĠĠĠ", "1", "Ġ+", "Ġ", "2", "2", "Ċĉ", "3"]),
        ("٣٤ ½ ²", ["Ù", "£", "Ù", "¤", "Ġ", "Â½", "Ġ", "Â²"]),
    ],
)
def test_the_tokenizer_splits_text_as_the_original(embedded_model: LanguageModel, text: str, tokens: list[str]) -> None:
    assert embedded_model.tokenizer.tokenize(text) == tokens
    assert embedded_model.tokenizer.decode(embedded_model.tokenizer(text).input_ids) == text


def test_it_answers(embedded_model: LanguageModel) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    tokenizer: Any = embedded_model.tokenizer
    model: Any = embedded_model.model
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(embedded_model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_from_then_on_it_comes_from_the_cache(embedded_model: LanguageModel) -> None:
    steps: list[str] = []
    start = time.perf_counter()
    stored = obtain_model(DEFAULT_MODEL, progress=lambda text, _: steps.append(text))
    assert time.perf_counter() - start < 2
    assert stored.folder == embedded_model.folder and stored.fingerprint == embedded_model.fingerprint
    assert not any("Fetching" in step or "Converting" in step for step in steps)


def test_both_dtypes_give_nearly_the_same_logits(embedded_model: LanguageModel) -> None:
    ids = torch.tensor([embedded_model.tokenizer("The capital of France is").input_ids])
    predictions = []
    for dtype in ("float32", "bfloat16"):
        model = load_language_model(embedded_model.folder, device="cpu", dtype=dtype, progress=silent).model
        with torch.inference_mode():
            predictions.append(model(ids).logits[0, -1].float().softmax(-1))
    assert (predictions[0] - predictions[1]).abs().max() < 0.05
    assert predictions[0].argmax() == predictions[1].argmax()


def test_the_command_line_finds_and_measures_it(
    embedded_model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", "path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == embedded_model.folder
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["models"]["default_folder"] == str(embedded_model.folder)
    speed = report["speed"]
    assert speed["model"] == DEFAULT_MODEL
    assert speed["prefill_tokens_per_second"] > speed["decode_tokens_per_second"] > 0
    assert report["memory_gb_per_second"] > 0
