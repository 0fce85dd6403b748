"""Tiny language models and generators for tests of what stands on them: specialisation, the chat model, the agent."""

from pathlib import Path

import torch

from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_language_model
from tests.tiny_models import save_tiny_model


def tiny_language_model(folder: Path, seed: int = 0, dtype: str = "float32") -> LanguageModel:
    """A tiny random LM, saved to `folder` (in float32) and loaded from there in `dtype`."""
    save_tiny_model(folder, seed=seed)
    return load_language_model(folder, device="cpu", dtype=dtype, progress=lambda step, part: None)


def tiny_generator(edge: LanguageModel, seed: int = 0) -> LoRAGenerator:
    """A random generator with the edge LM on both sides, whose weights differ from registry to registry."""
    torch.manual_seed(seed)
    generator = LoRAGenerator(GeneratorConfig(n_experts=4, top_k=2, rank=4, router_width=8, cloud_rank=2), edge, edge)
    with torch.no_grad():
        for tensor in generator.own_tensors().values():
            if tensor.is_floating_point() and tensor.dim() > 1:
                tensor.normal_(std=0.3)
    return generator.eval()
