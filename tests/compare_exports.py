"""Greedy text of a specialised model, and of its exports in the runtimes that they are for.

    python -m tests.compare_exports --tools tools.jsonl --calls calls_dev.jsonl --requests 50 --keep texts.jsonl

A run that was stopped goes on with what it has kept. All run the same weights in float32, without grammar and without
scoring of tools, so equal text is what must come out. The base model goes to llama.cpp as a float32 GGUF file that is
written from the same tensors.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loragen_agents.conversation.prompts import Turn
from loragen_agents.edge.sampling import Sampling
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.registry import ToolRegistry
from loragen_agents.specialization.exports import ADAPTER_FILE, export
from loragen_agents.specialization.specialize import specialize
from loragen_agents.support.json_lines import json_lines
from tests.decoded_steps import decoded
from tests.llama_cpp import LlamaCpp
from tests.tiny_gguf import write_gguf

STOP = "\nObservation:"


def compare(
    edge: LanguageModel,
    generator: LoRAGenerator,
    blocks: Sequence[tuple[ToolRegistry, Sequence[str]]],
    folder: Path,
    *,
    forms: Sequence[str] = ("peft", "gguf", "merged", "openvino"),
    max_tokens: int = 48,
    kept: Path | None = None,
) -> dict[str, list[tuple[str, str]]]:
    """For every export: what the specialised model wrote and what the export wrote, request by request.

    Args:
        edge: the edge LM, in float32.
        generator: its generator.
        blocks: registries, each with requests to it.
        folder: where the exports go.
        forms: which exports.
        max_tokens: most tokens of a text.
        kept: a file that what is written is added to, registry by registry; what is in it is not written again.
    """
    done = [row for _, row in json_lines(kept)] if kept is not None and kept.exists() else []
    base = folder / "base.gguf"
    if "gguf" in forms:
        write_gguf(base, edge.model, edge.tokenizer)  # type: ignore[arg-type]
    pairs: dict[str, list[tuple[str, str]]] = {form: [] for form in forms}
    for number, (registry, requests) in enumerate(blocks):
        if number < len(done):
            for form in forms:
                pairs[form] += [(ours, theirs) for ours, theirs in done[number][form]]
            continue
        made = specialize(registry, edge=edge, cloud=edge, generator=generator, cache=False)
        prompts = [made.model.renderer.user_turn([Turn(request)]) for request in requests]
        sampling = Sampling(max_tokens=max_tokens)
        ours = [
            decoded(made.model, [Turn(request)], sampling, grammar=False, score_tools=False).text
            for request in requests
        ]
        for form in forms:
            out = folder / f"{number}-{form}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
                export(made, edge, out, form)  # type: ignore[arg-type]
            if form == "gguf":
                with LlamaCpp(base, out / ADAPTER_FILE) as llama:
                    theirs = [llama.complete(prompt, max_tokens=max_tokens, stop=[STOP]) for prompt in prompts]
            elif form == "openvino":
                theirs = _openvino(out, edge, prompts, max_tokens)
            else:
                theirs = _transformers(_load(form, out, edge), edge, prompts, max_tokens)
            pairs[form] += zip(ours, theirs, strict=True)
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({form: pairs[form][-len(requests) :] for form in forms}) + "\n")
    return pairs


def _load(form: str, folder: Path, edge: LanguageModel) -> Any:
    source = folder if form == "merged" else edge.folder
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    return model if form == "merged" else PeftModel.from_pretrained(model, folder).merge_and_unload()


def _openvino(folder: Path, edge: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    from tests.openvino_alone import OpenVINOAlone  # not everywhere there is OpenVINO

    end = edge.tokenizer.eos_token_id
    assert isinstance(end, int)
    alone = OpenVINOAlone(folder)
    texts = (str(edge.tokenizer.decode(alone.greedy(prompt, max_tokens, end))) for prompt in prompts)
    return [text.partition(STOP)[0] for text in texts]


def _transformers(model: Any, edge: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                stop_strings=[STOP],
                tokenizer=edge.tokenizer,
            )
        text = edge.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
        texts.append(str(text).partition(STOP)[0])
    return texts


def main() -> None:
    """Compare on requests of a calls file and print the counts as JSON, and every pair that differs."""
    from loragen_agents.bench.calls import calls_task, read_data

    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=Path, required=True)
    parser.add_argument("--calls", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--forms", default="peft,gguf,merged,openvino")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where texts are kept, to go on from")
    arguments = parser.parse_args()
    edge = load_language_model(dtype="float32")
    generator = LoRAGenerator.load("default", cloud=edge, edge=edge)
    data = read_data([arguments.tools], [arguments.calls])
    task = calls_task(data.tools, data.calls, registry_size=8, requests=arguments.requests, seed=1)
    # As many of each source, in registries of up to eight requests.
    chosen = task.samples[:: max(1, len(task.samples) // arguments.requests)][: arguments.requests]
    blocks: list[tuple[ToolRegistry, list[str]]] = []
    for sample in chosen:
        if not blocks or blocks[-1][0].fingerprint != sample.registry.fingerprint:
            blocks.append((sample.registry, []))
        blocks[-1][1].append(sample.turns[-1].request)
    with tempfile.TemporaryDirectory() as folder:
        forms = arguments.forms.split(",")
        options: Any = {"forms": forms, "max_tokens": arguments.max_tokens, "kept": arguments.keep}
        pairs = compare(edge, generator, blocks, Path(folder), **options)
    counts = {form: f"{sum(a == b for a, b in both)} of {len(both)} equal" for form, both in pairs.items()}
    print(json.dumps({"registries": len(blocks), **counts}, indent=2))
    for form, both in pairs.items():
        for ours, theirs in both:
            if ours != theirs:
                print(json.dumps({"form": form, "ours": ours, "theirs": theirs}))


if __name__ == "__main__":
    main()
