"""What a turn costs: prompt tokens, time, memory; measured one turn at a time, summed up one variant at a time.

Does not know what was asked or how well it was answered. Times are wall clock; memory is what a turn adds to that of
the model, as the accelerator's allocator or the operating system counts it.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from loragen_agents.bench.statistics import Timing, timing


@dataclass(frozen=True)
class TurnCost:
    """One turn: token counts, seconds to the first token and in all, bytes of memory added at the peak (or None)."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_seconds: float
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class VariantCost:
    """The costs of one variant.

    Attributes:
        prompt_tokens, read_tokens: median length of a prompt, and of what of it was not in the KV cache already.
        compression: median prompt tokens of the reference variant (definitions in the prompt) over this variant's.
        first_token_ms, turn_ms: time to the first token and of the whole turn.
        tokens_per_second: over all tokens after each turn's first.
        equal_turn_ms: time of a turn of `equal_tokens` tokens: first token, then the median time of each further one.
            Variants write different texts; this compares them at the same length.
        model_bytes: what the variant's weights take up.
        peak_bytes: `model_bytes` and the largest addition that a turn made; None where it could not be measured.
        kv_bytes: KV cache at the end of the longest turn, from the model's shape.
        setup_ms: median time to get ready for a registry: specialising, or reading the prefix into the cache.
        break_even_turns: turns after which specialising has paid for itself against the reference variant; `inf` where
            a turn is no cheaper.
        break_even_cached_turns: the same against the reference variant with its prefix cached.
    """

    prompt_tokens: float
    read_tokens: float
    output_tokens: float
    compression: float | None
    first_token_ms: Timing | None
    turn_ms: Timing | None
    tokens_per_second: float | None
    equal_turn_ms: float | None
    model_bytes: int
    peak_bytes: int | None
    kv_bytes: int
    setup_ms: Timing | None
    break_even_turns: float | None = None
    break_even_cached_turns: float | None = None


def variant_cost(
    turns: Sequence[TurnCost],
    setup_seconds: Sequence[float],
    *,
    model_bytes: int,
    kv_bytes: int,
    equal_tokens: int,
    reference_prompt_tokens: float | None,
) -> VariantCost | None:
    """Sum up one variant; None without turns. The first turn of a run warms caches up and doesn't count as timed."""
    if not turns:
        return None
    timed = turns[1:] if len(turns) > 1 else turns
    per_token = [
        (turn.seconds - turn.first_token_seconds) / (turn.output_tokens - 1) for turn in timed if turn.output_tokens > 1
    ]
    prompt = float(median(turn.prompt_tokens for turn in turns))
    first = timing([1000 * turn.first_token_seconds for turn in timed])
    equal = None
    if per_token and first is not None:
        equal = first.median + 1000 * median(per_token) * (equal_tokens - 1)
    peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
    after_first = sum(turn.seconds - turn.first_token_seconds for turn in timed if turn.output_tokens > 1)
    further = sum(turn.output_tokens - 1 for turn in timed if turn.output_tokens > 1)
    return VariantCost(
        prompt_tokens=prompt,
        read_tokens=float(median(turn.prompt_tokens - turn.cached_tokens for turn in turns)),
        output_tokens=float(median(turn.output_tokens for turn in turns)),
        compression=reference_prompt_tokens / prompt if reference_prompt_tokens else None,
        first_token_ms=first,
        turn_ms=timing([1000 * turn.seconds for turn in timed]),
        tokens_per_second=further / after_first if after_first > 0 else None,
        equal_turn_ms=equal,
        model_bytes=model_bytes,
        peak_bytes=model_bytes + max(peaks) if peaks else None,
        kv_bytes=kv_bytes,
        setup_ms=timing([1000 * seconds for seconds in setup_seconds]),
    )


def break_even_turns(variant: VariantCost, reference: VariantCost) -> float | None:
    """Turns after which the variant's set-up has paid for itself; 0 where it costs no more, `inf` where it never does.

    Both set-ups count, and turns are compared at the same output length.
    """
    if variant.equal_turn_ms is None or reference.equal_turn_ms is None:
        return None
    extra = (variant.setup_ms.median if variant.setup_ms else 0.0) - (
        reference.setup_ms.median if reference.setup_ms else 0.0
    )
    saved = reference.equal_turn_ms - variant.equal_turn_ms
    if extra <= 0:
        return 0.0
    return extra / saved if saved > 0 else math.inf


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


def kv_cache_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values for `tokens` tokens: 2 · layers · KV heads · head width · tokens · bytes a number.

    Layers with a sliding window keep at most the window.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or tokens
    kept = sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds)
    return int(2 * kept * heads * width * torch.empty((), dtype=dtype).element_size())


class PeakMemory:
    """Bytes of memory that a stretch of work adds at its peak; `bytes` is None where the system can't tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes: int | None = None

    @contextmanager
    def measure(self) -> Iterator[PeakMemory]:
        before = self._reset()
        yield self
        peak = self._peak() if before is not None else None
        self.bytes = max(0, peak - before) if peak is not None and before is not None else None

    def _reset(self) -> int | None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        # What the allocator has kept from earlier work would be used again and not be seen.
        _release_free_memory()
        try:
            # Linux: sets the process's high-water mark back to what it uses now.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return _status_bytes("VmRSS")

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM")


def _release_free_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return None
