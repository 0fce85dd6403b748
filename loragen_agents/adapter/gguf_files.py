"""LoRA weights as a GGUF file, in which llama.cpp and what is built on it (Ollama, LM Studio) take adapters."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.errors import CheckpointError
from loragen_agents.support.files import replacing


def save_gguf(
    weights: LoRAWeights, path: str | Path, *, model_type: str, module_paths: Sequence[str], name: str = ""
) -> Path:
    """Write an adapter for `llama-server --lora` and Ollama's `ADAPTER`.

    llama.cpp scales each product B·A by alpha / r with the matrix's own r; a matrix whose r is not `weights.rank`
    therefore has the difference in its B. Tensors are written in float32.

    Args:
        weights: the LoRA weights.
        path: the file to write; it takes the place of one that is there.
        model_type: `model_type` of the model's Hugging Face config, such as "llama".
        module_paths: path of each layer's FFN module inside the model, as `gated_ffn_layers` gives them.
        name: what the adapter is called in the file.

    Raises:
        CheckpointError: llama.cpp has no such architecture, or no name for one of its matrices.
        ValueError: there are more or fewer paths than layers, or there is no entry to save.
    """
    if len(module_paths) != weights.layers:
        raise ValueError(f"weights for {weights.layers} layers can't go to {len(module_paths)} module paths")
    if not weights.tensors:
        raise ValueError("these LoRA weights have no entry, and an adapter without one can't be loaded")
    architecture = _architecture(model_type)
    names = gguf.get_tensor_name_map(architecture, weights.layers)
    target = Path(path)
    with replacing(target) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(weights.alpha))
            if name:
                writer.add_name(name)
            for layer, projection in weights.entries:
                a, b = weights.tensors[layer, projection]
                module = f"{module_paths[layer]}.{projection}"
                known = names.get_name(module)
                if known is None:
                    raise CheckpointError(f"llama.cpp's {model_type} has no matrix for {module}")
                writer.add_tensor(f"{known}.weight.lora_a", _array(a))
                writer.add_tensor(f"{known}.weight.lora_b", _array(b.float() * (a.shape[0] / weights.rank)))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return target


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _architecture(model_type: str) -> gguf.MODEL_ARCH:
    """llama.cpp's architecture of a Hugging Face model type; names are compared without marks and without `_text`."""
    wanted = model_type.removesuffix("_text").replace("_", "").replace("-", "").lower()
    for architecture, name in gguf.MODEL_ARCH_NAMES.items():
        if name.replace("_", "").replace("-", "").lower() == wanted:
            return architecture
    raise CheckpointError(f"llama.cpp's GGUF format has no architecture {model_type!r}; export a PEFT folder instead")
