"""The commands specialize and ask on tiny random models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from loragen_agents import ToolRegistry, cli
from loragen_agents.assistant import loading
from loragen_agents.edge.specialized import SpecializedLM
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import load_language_model
from tests.tiny_chat import tiny_generator, tiny_language_model
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


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def options(tmp_path_factory, request) -> list[str]:
    folder = tmp_path_factory.mktemp("parts")
    edge = tiny_language_model(folder / "edge")
    tiny_generator(edge).save(folder / "generator")
    REGISTRY.to_yaml(folder / "tools.yaml")
    return [
        *("--tools", str(folder / "tools.yaml"), "--edge", str(folder / "edge")),
        *("--generator", str(folder / "generator"), "--device", "cpu", "--dtype", request.param),
    ]


def test_specialize_writes_what_peft_loads(options, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert cli.main(["specialize", *options, "--system", "Be brief.", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tools"] == ["roll", "pick"]
    assert report["registry_fingerprint"] == REGISTRY.fingerprint
    assert (report["matrices"], report["untrained"]) == (9, False)
    assert report["milliseconds"] > 0
    edge = load_language_model(options[3], device="cpu", dtype=options[-1])
    generator = LoRAGenerator.load(options[5], cloud=edge, edge=edge)
    definitions = SpecializedLM(edge, None, REGISTRY).renderer.definitions(REGISTRY, "Be brief.")
    weights = generator.generate(definitions, REGISTRY)
    # The weights depend on the dtype that the definitions are read in; how they are applied is compared in float32.
    merged = tiny_model()
    weights.merge_into(merged)
    loaded = PeftModel.from_pretrained(tiny_model(), out)
    tokens = torch.arange(3, 23)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny_model()(tokens).logits, merged(tokens).logits, atol=1e-2)


def test_chat_decodes_in_the_dtype_that_is_asked_for(options, tmp_path, monkeypatch):
    used: list[Any] = []
    load = loading.load_chat_model

    def watched(choice: Any) -> Any:
        used.append(load(choice))
        return used[-1]

    monkeypatch.setattr(loading, "load_chat_model", watched)
    monkeypatch.setenv("LORAGEN_AGENTS_DATA", str(tmp_path / "data"))
    cli.main(["chat", *options, "--root", str(tmp_path), "--max-steps", "1", "--json", "Hello"])
    assert [str(model.model.dtype) for model in used] == [f"torch.{options[-1]}"]


def test_an_empty_out_is_not_the_current_folder(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["specialize", *options, "--out", ""])
    assert "expected the path of a folder, got an empty text" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_json", [True, False])
def test_a_cache_that_can_not_be_written_is_a_warning(options, tmp_path, capsys, caplog, monkeypatch, as_json):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE", str(tmp_path / "file"))
    flags = ["Hello", "--tool-choice", "none", "--system", f"{as_json}", "--max-tokens", "4"] + ["--json"] * as_json
    assert cli.main(["ask", *options, *flags]) == 0
    assert caplog.text.count("can't be kept") == 1
    said = capsys.readouterr().out
    if as_json:
        assert json.loads(said)["specialization"] == "generated"


@pytest.mark.parametrize(
    "command",
    [
        ["specialize", "--tools", "assistant", "--out", "adapter"],
        ["serve", "--port", "0"],
    ],
)
def test_a_service_is_no_language_model(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--cloud", "http://127.0.0.1:1"]) == 1
    assert "http://127.0.0.1:1 is the address of a service; expected a language model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_specialize_says_what_it_did(options, tmp_path, capsys):
    assert cli.main(["specialize", *options, "--out", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    assert "2: roll, pick" in said
    assert "9 matrices, rank 4" in said
    assert "not trained" not in said


@pytest.mark.parametrize(
    ("form", "file", "said"),
    [
        ("peft", "adapter_model.safetensors", "PeftModel.from_pretrained(model, '"),
        ("gguf", "adapter.gguf", "llama-server --lora "),
        ("merged", "model.safetensors", "AutoModelForCausalLM.from_pretrained('"),
        ("openvino", "openvino_model.xml", "openvino.compile_model('"),
    ],
)
def test_specialize_writes_for_other_runtimes(options, tmp_path, capsys, form, file, said):
    assert cli.main(["specialize", *options, "--format", form, "--out", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    assert {file, "grammar.gbnf", "loragen-agents.json"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("as_json", [True, False])
def test_ask_shows_a_call(options, capsys, as_json):
    flags = ["--tool-choice", "pick", "--max-tokens", "80"] + ["--json"] * as_json
    assert cli.main(["ask", *options, "Pick one", *flags]) == 0
    said = capsys.readouterr().out
    if not as_json:
        assert said.startswith("Thought: Do I need to use a tool? Yes\nAction: pick\n")
        assert 'Arguments: {"number": 3}' in said
        return
    report = json.loads(said)
    assert report["step"] == {
        "kind": "tool",
        "thought": True,
        "action": "pick",
        "action_input": '{"number": 3}',
        "arguments": {"number": 3},
    }
    assert report["finish_reason"] == "stop"
    assert report["compression_ratio"] == round(1 + report["definition_tokens"] / report["prompt_tokens"], 2)


def test_ask_shows_an_answer_and_remembers_the_registry(options, capsys):
    runs = []
    for _ in range(2):
        assert cli.main(["ask", *options, "Hello", "--tool-choice", "none", "--max-tokens", "12", "--json"]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    assert runs[0]["step"]["kind"] == "answer"
    assert runs[0]["step"] == runs[1]["step"]
    assert (runs[0]["specialization"], runs[1]["specialization"]) == ("generated", "disk")
    assert runs[1]["specialize_ms"] == 0


def test_ask_tells_the_probabilities_of_the_tools(options, capsys):
    assert cli.main(["ask", *options, "Hello", "--max-tokens", "12", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tool_probabilities"].keys() == {"roll", "pick"}
    assert sum(report["tool_probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert 0 <= report["tool_call_probability"] <= 1


def test_ask_shows_what_it_cannot_read(options, capsys):
    assert cli.main(["ask", *options, "Hello", "--no-grammar", "--max-tokens", "4"]) == 0
    assert "can't be read" in capsys.readouterr().out


def test_an_untrained_generator_is_named_as_such(options, tmp_path, capsys):
    edge = load_language_model(options[3], device="cpu", dtype=options[-1])
    config = GeneratorConfig(n_experts=2, top_k=1, rank=2, router_width=4, cloud_rank=2)
    LoRAGenerator(config, edge, edge).save(tmp_path / "untrained")
    rest = [*options[:4], "--generator", str(tmp_path / "untrained"), *options[6:]]
    assert cli.main(["ask", *rest, "Hello", "--max-tokens", "8"]) == 0
    assert "not trained yet" in capsys.readouterr().out
    assert cli.main(["specialize", *rest, "--out", str(tmp_path / "out")]) == 0
    assert "not trained yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--tools", "nowhere.yaml"], "there is no registry file nowhere.yaml"),
        (["--tools", "gpt4tools_nowhere"], "gpt4tools_seen"),
        (["--tool-choice", "dance"], "'dance' is none of the tools (roll, pick)"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--generator", "nowhere"], "is missing"),
        (["--edge", "./nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_paragraph(options, change, said, capsys):
    assert cli.main(["ask", *options, "Hello", *change]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert said in captured.err


def test_shipped_registries_go_by_name(options, tmp_path: Path, capsys):
    named = ["--tools", "gpt4tools_unseen", *options[2:]]
    assert cli.main(["specialize", *named, "--out", str(tmp_path / "adapter"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tools"]) == 8
