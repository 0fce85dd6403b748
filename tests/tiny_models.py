"""Tiny random models with a tokenizer of their own, made on the spot for unit tests."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nA default system text.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Thought: Do I need to use a tool? Yes",
    "Action: calculator\nAction Input: 1 + 2\nObservation: 3",
    "Thought: Do I need to use a tool? No\nAI: The answer is three.",
    '{"expression": "2 * 3", "path": "notes.txt"}',
]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@lru_cache
def _trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every byte has a token, with ChatML control tokens; a new one each time."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_trained_tokenizer(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random causal LM with a gated FFN; `family` is llama, qwen or gemma."""
    vocab = _trained_tokenizer().get_vocab_size()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_key_value_heads=2, **SIZES))
    elif family == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, num_key_value_heads=2, **SIZES))
    elif family == "gemma":
        model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=vocab, num_key_value_heads=2, head_dim=8, **SIZES))
    else:
        raise ValueError(f"unknown family {family!r}: expected llama, qwen or gemma")
    # Random models of the default scale give nearly flat logits, which would hide differences between two of them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id = _trained_tokenizer().token_to_id("<|im_end|>")
    return model.to(dtype).eval()  # type: ignore[arg-type]  # the wrapper of transformers hides the signature


def save_tiny_model(folder: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny model and its tokenizer as a Hub-style folder of safetensors."""
    tiny_model(family, seed, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
