import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from loragen_agents.errors import ModelLoadError
from loragen_agents.models import gguf as gguf_conversion
from loragen_agents.models import language_models
from loragen_agents.models.fingerprints import tensor_fingerprint
from loragen_agents.models.language_models import (
    choose_dtype,
    gated_ffn_layers,
    load_cloud_model,
    load_language_model,
)
from loragen_agents.support.progress import silent
from tests.tiny_gguf import write_gguf
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


class TestFolder:
    def test_it_is_loaded_as_it_was_saved(self, folder: Path, cache: Path) -> None:
        loaded = load_language_model(folder, dtype="float32", cache_dir=cache, progress=silent)
        ids = torch.tensor([[5, 9, 100, 200, 33]])
        assert torch.equal(loaded.model(ids).logits, tiny_model()(ids).logits)
        assert loaded.tokenizer("Action: calculator").input_ids == tiny_tokenizer()("Action: calculator").input_ids
        assert loaded.name == str(folder) and loaded.folder == folder
        assert loaded.fingerprint == tensor_fingerprint(folder)
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())

    @pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
    def test_in_a_chosen_dtype_with_the_same_fingerprint(
        self, folder: Path, cache: Path, name: str, dtype: torch.dtype
    ) -> None:
        by_name = load_language_model(folder, dtype=name, cache_dir=cache, progress=silent)
        by_value = load_language_model(folder, dtype=dtype, cache_dir=cache, progress=silent)
        assert by_name.dtype == by_value.dtype == dtype
        assert by_name.fingerprint == tensor_fingerprint(folder)

    def test_a_model_without_a_padding_token_gets_the_end_token(self, folder: Path, cache: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["pad_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_language_model(folder, cache_dir=cache, progress=silent).tokenizer
        assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"

    def test_without_a_tokenizer(self, folder: Path, cache: Path) -> None:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelLoadError, match=r"model has no tokenizer; expected one of tokenizer\.json"):
            load_language_model(folder, cache_dir=cache, progress=silent)

    def test_without_weights(self, folder: Path, cache: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ModelLoadError, match=r"holds no weights: expected model\.safetensors"):
            load_language_model(folder, cache_dir=cache, progress=silent)

    @pytest.mark.parametrize("damage", ["missing", "shape"])
    def test_weights_that_do_not_fit_the_configuration(self, folder: Path, cache: Path, damage: str) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors = load_file(folder / "model.safetensors")
        if damage == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            load_language_model(folder, cache_dir=cache, progress=silent)

    def test_code_that_comes_with_a_model_is_not_run(self, folder: Path, cache: Path) -> None:
        (folder / "evil.py").write_text("raise SystemExit('was run')\n")
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match="can't be loaded: it needs code of its own, which is never run"):
            load_language_model(folder, cache_dir=cache, progress=silent)

    def test_steps_are_told(self, folder: Path, cache: Path) -> None:
        steps: list[tuple[str, float | None]] = []
        load_language_model(folder, cache_dir=cache, progress=lambda *step: steps.append(step))
        assert ("Checking the weights in model", 1.0) in steps
        assert steps[-1] == (f"Loading {folder}", None)

    def test_transformers_bars_are_switched_back_on(self, folder: Path, cache: Path) -> None:
        transformers.utils.logging.enable_progress_bar()
        load_language_model(folder, cache_dir=cache, progress=silent)
        assert transformers.utils.logging.is_progress_bar_enabled()


class TestGguf:
    def test_weights_and_tokenizer_come_out_as_they_went_in(self, tmp_path: Path, cache: Path) -> None:
        original, tokenizer = tiny_model(), tiny_tokenizer()
        path = write_gguf(tmp_path / "tiny.gguf", original, tokenizer, pre_tokenizer="gpt-2")
        loaded = load_language_model(path, dtype="float32", cache_dir=cache, progress=silent)
        ids = torch.tensor([[5, 9, 100, 200, 33]])
        # bf16 is what conversions are kept in; llama.cpp keeps rms_norm_eps as float32.
        expected = original.bfloat16().float()(ids).logits
        assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-4)
        for text in ("Action: calculator\nAction Input: 1 + 2", "a  17 tools", "<|im_start|>user\nx<|im_end|>"):
            assert loaded.tokenizer(text).input_ids == tokenizer(text).input_ids
        for token in ("bos_token", "eos_token", "pad_token", "chat_template"):
            assert getattr(loaded.tokenizer, token) == getattr(tokenizer, token)
        assert loaded.tokenizer.model_max_length == original.config.max_position_embeddings

    def test_smollm_keeps_digits_apart_from_the_spaces_before_them(self, tmp_path: Path, cache: Path) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tiny_tokenizer(), pre_tokenizer="smollm")
        tokenizer = load_language_model(path, cache_dir=cache, progress=silent).tokenizer
        pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  17\n\n1.")]
        assert pieces == ["a", "ĠĠ", "1", "7", "ĊĊ", "1", "."]

    def test_a_file_in_parts_gives_the_same_model(self, tmp_path: Path, cache: Path) -> None:
        whole = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tiny_tokenizer())
        content = whole.read_bytes()
        half = len(content) // 2
        (tmp_path / "tiny.gguf.part0").write_bytes(content[:half])
        (tmp_path / "tiny.gguf.part1").write_bytes(content[half:])
        joined = load_language_model(tmp_path / "tiny.gguf.part0", cache_dir=cache, progress=silent)
        assert joined.fingerprint == load_language_model(whole, cache_dir=cache, progress=silent).fingerprint
        assert joined.name == "tiny"

    def test_files_beside_the_gguf_are_not_taken_up(self, tmp_path: Path, cache: Path) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tiny_tokenizer())
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "pad_token": "a"}')
        (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 1}')
        loaded = load_language_model(path, cache_dir=cache, progress=silent)
        assert loaded.tokenizer.pad_token == "<|endoftext|>"
        assert loaded.model.generation_config.max_new_tokens is None

    @pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
    def test_a_file_that_was_cut_short(self, tmp_path: Path, cache: Path, keep: float) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tiny_tokenizer())
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ModelLoadError, match="the GGUF file of tiny can't be converted"):
            load_language_model(path, cache_dir=cache, progress=silent)
        assert not list(cache.glob("models/tiny*"))

    def test_an_unknown_architecture_is_named(self, tmp_path: Path, cache: Path) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tiny_tokenizer())
        path.write_bytes(path.read_bytes().replace(b"llama", b"xlama"))
        with pytest.raises(ModelLoadError, match="xlama"):
            load_language_model(path, cache_dir=cache, progress=silent)

    def test_the_bar_of_the_gguf_reader_is_put_back(self, tmp_path: Path, cache: Path, capfd) -> None:
        from transformers import modeling_gguf_pytorch_utils as reader

        bar = reader.tqdm
        path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), tiny_tokenizer())
        capfd.readouterr()
        load_language_model(path, cache_dir=cache, progress=silent)
        assert reader.tqdm is bar
        assert "it/s" not in capfd.readouterr().err

    def test_older_transformers_without_a_gguf_config(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "quantization_config" in gguf_conversion._unpacked()
        monkeypatch.setattr(gguf_conversion.transformers, "GgufConfig", None)
        assert gguf_conversion._unpacked() == {}


class TestCloudModel:
    def test_one_model_on_both_sides_is_loaded_once(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LORAGEN_AGENTS_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        edge = load_language_model(folder, device="cpu", progress=silent)
        for name in (None, str(folder), folder.name):
            assert load_cloud_model(name, edge, device="cpu", progress=silent) is edge
        other = save_tiny_model(tmp_path / "other", seed=1)
        cloud = load_cloud_model(str(other), edge, device="cpu", dtype="bfloat16", progress=silent)
        assert cloud.fingerprint == tensor_fingerprint(other) and cloud.dtype == torch.bfloat16


class TestDevicesAndDtypes:
    @pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta?"])
    def test_a_device_that_is_not_there(self, folder: Path, cache: Path, device: str) -> None:
        with pytest.raises(ModelLoadError, match=r"device .* can't be used here .*expected auto, cpu"):
            load_language_model(folder, device=device, cache_dir=cache, progress=silent)

    def test_an_unknown_dtype(self, folder: Path, cache: Path) -> None:
        with pytest.raises(ModelLoadError, match="dtype is 'int3': expected auto, bfloat16"):
            load_language_model(folder, dtype="int3", cache_dir=cache, progress=silent)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_auto_obeys_the_environment(
        self, folder: Path, cache: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LORAGEN_AGENTS_DTYPE", str(dtype).removeprefix("torch."))
        assert load_language_model(folder, cache_dir=cache, progress=silent).dtype == dtype
        assert load_language_model(folder, dtype="float16", cache_dir=cache, progress=silent).dtype == torch.float16
        monkeypatch.setenv("LORAGEN_AGENTS_DTYPE", "half")
        with pytest.raises(ModelLoadError, match="LORAGEN_AGENTS_DTYPE is 'half': expected auto"):
            load_language_model(folder, cache_dir=cache, progress=silent)

    def test_a_model_that_is_loaded_in_inference_mode_can_be_trained_later(self, folder: Path, cache: Path) -> None:
        with torch.inference_mode():
            model = load_language_model(folder, cache_dir=cache, progress=silent).model
        model.requires_grad_(True)
        model(torch.arange(3, 9)[None]).logits.sum().backward()

    def test_bf16_on_cpus_that_have_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = torch.device("cpu")
        monkeypatch.setattr(language_models, "cpu_computes_bf16", lambda: True)
        assert choose_dtype(cpu, 1000) == torch.bfloat16
        monkeypatch.setattr(language_models, "cpu_computes_bf16", lambda: False)
        assert choose_dtype(cpu, 1000) == torch.float32
        assert choose_dtype(cpu, 10**15) == torch.bfloat16

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"avx512_bf16": True}, True),
            ({"amx_bf16": True}, True),
            ({"bf16": True}, True),
            ({"avx512_f": True}, False),
        ],
    )
    def test_cpu_flags(self, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
        assert language_models.cpu_computes_bf16() is expected

    def test_auto_takes_the_gpu_when_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert language_models._device("auto") == torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert language_models._device("auto") == torch.device("cpu")


class TestGatedFfnLayers:
    @pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
    def test_in_the_order_of_the_layers(self, family: str) -> None:
        model = tiny_model(family)
        layers = gated_ffn_layers(model)
        assert [path for path, _ in layers] == [f"model.layers.{number}.mlp" for number in range(3)]
        for path, module in layers:
            assert model.get_submodule(path) is module

    def test_a_plain_ffn_is_refused(self) -> None:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=1))
        with pytest.raises(ModelLoadError, match="GPT2LMHeadModel has no gated FFN"):
            gated_ffn_layers(model)

    def test_a_mixture_of_experts_is_refused(self) -> None:
        config = MixtralConfig(
            vocab_size=10,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_local_experts=2,
        )
        with pytest.raises(ModelLoadError, match="mixtures of experts"):
            gated_ffn_layers(MixtralForCausalLM(config))
