"""Exports on a tiny model, each loaded by the runtime that it is for: peft, transformers, llama.cpp and OpenVINO."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loragen_agents import ToolRegistry
from loragen_agents.adapter.gguf_files import save_gguf
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.conversation.prompts import Turn
from loragen_agents.edge.sampling import Sampling
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.errors import CheckpointError
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers
from loragen_agents.specialization.exports import export, prompt_template
from loragen_agents.specialization.specialize import Specialization, specialize
from tests.llama_cpp import LlamaCpp
from tests.tiny_chat import tiny_generator, tiny_language_model
from tests.tiny_gguf import write_gguf
from tests.tiny_models import tiny_model

REGISTRY = ToolRegistry.from_tools(
    [
        {"name": "roll", "description": "Roll a die."},
        {
            "name": "pick",
            "description": "Pick a number.",
            "parameters": {"type": "object", "properties": {"number": {"const": 3}}, "required": ["number"]},
        },
    ]
)
REQUESTS = [
    "Hello",
    "Roll!",
    "Pick 3 now",
    "What is the weather like?",
    "1 + 2",
    "Thank you.",
    "Thought: Action:",
    "A b c",
]


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> LanguageModel:
    return tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")


@pytest.fixture(scope="module")
def made(edge) -> Specialization:
    return specialize(REGISTRY, "Be brief.", edge=edge, cloud=edge, generator=tiny_generator(edge), cache=False)


def written(held: SpecializedLM) -> dict[str, str]:
    """What a model itself writes behind some requests, greedily, without grammar or scoring.

    The tiny model may write <|endoftext|>, at which llama.cpp stops and we don't: the text ends there.
    """
    found: dict[str, str] = {}
    for request in REQUESTS:
        done = held.decoder.generate([held.renderer.user_turn([Turn(request)])], Sampling(max_tokens=12))[0]
        ids = [*done.token_ids, held.edge.tokenizer.pad_token_id]
        ids = ids[: ids.index(held.edge.tokenizer.pad_token_id)]
        found[request] = str(held.edge.tokenizer.decode(ids, skip_special_tokens=True))
    assert len(set(found.values())) > 2
    return found


@pytest.fixture(scope="module")
def texts(made) -> dict[str, str]:
    return written(made.model)


def greedy(model: Any, made: Specialization, requests: Iterable[str]) -> list[str]:
    """What a transformers model writes behind the same prompts."""
    found = []
    for request in requests:
        prompt = torch.tensor([made.model.renderer.user_turn([Turn(request)])])
        with torch.inference_mode():
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
        found.append(str(made.model.edge.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)))
    return found


def same(ours: Iterable[str], theirs: list[str]) -> None:
    """Equal, but for what follows where our decoding stopped, and for bytes at the end that make no character."""
    for one, other in zip(ours, theirs, strict=True):
        assert other.startswith(one.rstrip("\ufffd"))


def test_peft_loads_the_folder(made, edge, texts, tmp_path):
    files = export(made, edge, tmp_path, "peft")
    assert {file.name for file in files} == {
        *("adapter_config.json", "adapter_model.safetensors", "grammar.gbnf", "loragen-agents.json")
    }
    model = PeftModel.from_pretrained(tiny_model(), tmp_path).merge_and_unload()
    same(texts.values(), greedy(model, made, texts))


def test_transformers_loads_the_merged_model(made, edge, texts, tmp_path):
    files = export(made, edge, tmp_path / "out", "merged")
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {file.name for file in files}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == edge.tokenizer.chat_template
    same(texts.values(), greedy(model, made, texts))
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, edge.model.model.layers[0].mlp.down_proj.weight)


def test_llama_cpp_loads_the_adapter(made, edge, texts, tmp_path):
    export(made, edge, tmp_path, "gguf")
    base = write_gguf(tmp_path / "base.gguf", edge.model, edge.tokenizer)
    prompts = [made.model.renderer.user_turn([Turn(request)]) for request in texts]
    with LlamaCpp(base, tmp_path / "adapter.gguf") as llama:
        same(texts.values(), [llama.complete(prompt, max_tokens=12) for prompt in prompts])
    with LlamaCpp(base) as bare:
        assert [bare.complete(prompt, max_tokens=12) for prompt in prompts] != [*texts.values()]


def test_llama_cpp_takes_the_grammar(made, edge, tmp_path):
    export(made, edge, tmp_path, "gguf")
    base = write_gguf(tmp_path / "base.gguf", edge.model, edge.tokenizer)
    grammar = (tmp_path / "grammar.gbnf").read_text()
    usage = json.loads((tmp_path / "loragen-agents.json").read_text())
    calls = set()
    with LlamaCpp(base, tmp_path / "adapter.gguf") as llama:
        for request in REQUESTS[:6]:
            prompt = usage["prompt"].replace("{request}", request)
            text = llama.complete(prompt, max_tokens=48, grammar=grammar, stop=usage["stop"])
            assert text.startswith((" Yes\nAction: ", " No\nAI: "))
            calls.add(text)
    allowed = {" Yes\nAction: roll\nAction Input: {}", ' Yes\nAction: pick\nAction Input: {"number": 3}'}
    assert {call for call in calls if call.startswith(" Yes")} <= allowed


@pytest.mark.parametrize("quantisation", ["none", "int8"])
def test_openvino_loads_the_graph(made, edge, texts, tmp_path, quantisation, monkeypatch):
    pytest.importorskip("openvino")
    from tests.openvino_alone import OpenVINOAlone

    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", quantisation)
    files = export(made, edge, tmp_path, "openvino")
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json", "loragen-agents.json"} < {
        file.name for file in files
    }
    alone, tokenizer = OpenVINOAlone(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompts = [made.model.renderer.user_turn([Turn(request)]) for request in texts]
    found = [str(tokenizer.decode(alone.greedy(prompt, 12, tokenizer.eos_token_id))) for prompt in prompts]
    if quantisation == "none":
        same(texts.values(), found)
    else:
        assert len(set(found)) > 2 and (tmp_path / "openvino_model.bin").stat().st_size < 200_000


def test_the_readmes_example_runs_the_graph(made, edge, tmp_path, capsys):
    pytest.importorskip("openvino")
    export(made, edge, tmp_path, "openvino")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (source,) = [part for part in readme.split("```python\n")[1:] if part.startswith("import json\nimport numpy")]
    exec(source.split("```")[0].replace("FOLDER", tmp_path.as_posix()), {})
    assert capsys.readouterr().out.strip()


def test_what_openvino_has_no_graph_for(made, edge, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr("loragen_agents.edge.openvino.graph.why_not", lambda model: "it has gears")
    with pytest.raises(CheckpointError, match="it has gears; choose another format"):
        export(made, edge, tmp_path, "openvino")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_of_its_own_keeps_its_scale(edge, tmp_path):
    """llama.cpp divides alpha by each matrix's own rank; ours is divided by one rank for all."""
    torch.manual_seed(0)
    tensors = {
        (layer, "down_proj"): (torch.randn(rank, 64) * 0.2, torch.randn(32, rank) * 0.2)
        for layer, rank in enumerate((1, 4, 9))
    }
    weights = LoRAWeights(3, 4, 8.0, tensors)
    paths = [path for path, _ in gated_ffn_layers(edge.model)]
    save_gguf(weights, tmp_path / "a.gguf", model_type="llama", module_paths=paths)
    base = write_gguf(tmp_path / "base.gguf", edge.model, edge.tokenizer)
    held = SpecializedLM(edge, weights, REGISTRY)
    texts = written(held)
    prompts = [held.renderer.user_turn([Turn(request)]) for request in texts]
    with LlamaCpp(base, tmp_path / "a.gguf") as llama:
        same(texts.values(), [llama.complete(prompt, max_tokens=12) for prompt in prompts])


def test_what_llama_cpp_has_no_name_for(made, edge, tmp_path):
    paths = [path for path, _ in gated_ffn_layers(edge.model)]
    with pytest.raises(CheckpointError, match="no architecture 'unheard'"):
        save_gguf(made.weights, tmp_path / "a.gguf", model_type="unheard", module_paths=paths)
    with pytest.raises(ValueError, match="no entry"):
        save_gguf(LoRAWeights(3, 4, 8.0, {}), tmp_path / "a.gguf", model_type="llama", module_paths=paths)
    with pytest.raises(CheckpointError, match="no matrix for"):
        save_gguf(made.weights, tmp_path / "a.gguf", model_type="llama", module_paths=["x", "y", "z"])
    assert list(tmp_path.iterdir()) == []


def test_the_modelfile(made, edge, tmp_path):
    export(made, edge, tmp_path, "gguf")
    lines = (tmp_path / "Modelfile").read_text()
    assert f"FROM {edge.folder}\nADAPTER ./adapter.gguf\n" in lines
    assert 'TEMPLATE """<|im_start|>user\n{{ .Prompt }}<|im_end|>' in lines
    assert 'Thought: Do I need to use a tool?"""' in lines
    assert 'PARAMETER stop "Observation:"' in lines


def test_the_prompt_is_the_one_that_is_decoded(made):
    renderer = made.model.renderer
    assert prompt_template(renderer, "Hello") == renderer.user_turn_text([Turn("Hello")])


def test_writing_again_replaces(made, edge, tmp_path):
    for _ in range(2):
        for form in ("peft", "gguf", "merged"):
            export(made, edge, tmp_path / form, form)
    assert not [path for path in Path(tmp_path).rglob(".*")]
