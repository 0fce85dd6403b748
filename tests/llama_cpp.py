"""llama.cpp in the process of a test, through the xllamacpp wheel."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import xllamacpp


class LlamaCpp:
    """llama.cpp's server with a GGUF model, and a LoRA adapter if one is given."""

    def __init__(self, model: Path, adapter: Path | None = None, *, context: int = 1024) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = context
        params.n_parallel = 1
        params.warmup = False
        params.cpuparams.n_threads = 1
        params.verbosity = 0
        # float32 throughout, as the models that its texts are compared with.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._server

    def complete(self, prompt: str | Sequence[int], *, max_tokens: int, **options: Any) -> str:
        """What the model writes greedily; nothing is cached, as llama.cpp would keep it across adapters."""
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": max_tokens,
            "temperature": 0,
            "cache_prompt": False,
            **options,
        }
        answer = self._server.handle_completions(request)
        if "choices" not in answer:
            raise AssertionError(f"llama.cpp refused: {answer}")
        return str(answer["choices"][0]["text"])
