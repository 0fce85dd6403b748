"""An exported graph in OpenVINO alone, as README.md says how to load it; for tests. Knows nothing of this package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov

# In float32 throughout, as the models that its texts are compared with.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


class OpenVINOAlone:
    """The graph of a folder, in an infer request."""

    def __init__(self, folder: Path, settings: dict[str, object] = EXACT) -> None:
        compiled = ov.compile_model(folder / "openvino_model.xml", "CPU", settings)
        self._request = compiled.create_infer_request()

    def logits(self, ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Logits behind the last token of each row (rows, vocabulary).

        Args:
            ids: the tokens to feed, with shape (rows, width).
            attention_mask: of all tokens so far, with shape (rows, span).
        """
        positions = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        rows = np.arange(len(ids), dtype=np.int32)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": positions, "beam_idx": rows}
        found: np.ndarray = self._request.infer(inputs)["logits"][:, -1]
        return found.copy()

    def greedy(self, prompt: Sequence[int], max_tokens: int, end: int) -> list[int]:
        """Greedy tokens behind a prompt, up to `max_tokens` or the token `end`, which is left out."""
        self._request.reset_state()
        fed, tokens = list(prompt), list[int]()
        while len(tokens) < max_tokens:
            mask = np.ones((1, len(prompt) + len(tokens)), dtype=np.int64)
            best = int(self.logits(np.array([fed], dtype=np.int64), mask).argmax())
            if best == end:
                break
            tokens.append(best)
            fed = [best]
        return tokens
