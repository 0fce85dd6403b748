"""A GGUF file becomes a Hub-style folder: bf16 safetensors, config and a tokenizer that behaves as the original's.

transformers reads the file and unpacks its quantised blocks; what it leaves out of the tokenizer is put back here.
bf16 holds all that the usual 4- to 8-bit files carry; files of float32 lose precision.
"""

import importlib
import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loragen_agents.errors import ModelLoadError
from loragen_agents.support.progress import Progress

# llama.cpp's names ("tokenizer.ggml.pre") of byte-level BPE vocabularies whose merges never join digits to anything.
# transformers knows no such name and would split them as GPT-2 does: in front of a number it cuts the spaces and line
# ends of "\n\n1." or "a  17" differently. Checked for smollm against llama.cpp's own tokenizer.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
# transformers' bars are switched for the whole process, so conversions take turns; each needs much memory anyway.
_CONVERTING = threading.Lock()
# What transformers writes where a tokenizer states no limit.
_NO_LIMIT = int(1e30)


def convert_gguf(gguf: Path, folder: Path, name: str, progress: Progress) -> None:
    """Convert a GGUF file and write the result to `folder`, which is made.

    Args:
        gguf: a file in a folder of its own: transformers would take up configuration files that lie beside it.
        name: the model's name, for messages.

    Raises:
        ModelLoadError: the file is damaged, or of an architecture or quantisation that transformers can't read.
        OSError, safetensors.SafetensorError: `folder` can't be written to.
    """
    with _CONVERTING, quiet_transformers(), _without_tensor_bar():
        progress(f"Reading {name} from its GGUF file", None)
        with _damage_named(name):
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        progress(f"Converting the weights of {name} to bf16 (once)", None)
        with _damage_named(name):
            # With output_loading_info it gives a pair, which its annotations do not know; mismatched sizes are then
            # in the report, and refused below by name.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                config=config,
                dtype=torch.bfloat16,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **_unpacked(),
            )
            model, report = loaded
        progress(f"Converting the tokenizer of {name} (once)", None)
        with _damage_named(name):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            _mend_tokenizer(tokenizer, gguf, config)
    check_complete(report, name)
    progress(f"Writing {name}", None)
    folder.mkdir()
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_complete(report: dict[str, Any], name: str) -> None:
    """Refuse a model for which transformers had to make up weights.

    Raises:
        ModelLoadError: tensors are missing or have other shapes than the config says.
    """
    absent = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if absent:
        raise ModelLoadError(
            f"the weights of {name} do not fit its configuration: {len(absent)} tensors are missing or of another "
            f"shape ({', '.join(sorted(absent)[:3])}{', ...' if len(absent) > 3 else ''})"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' own progress bars, which would draw over ours, for the length of a block."""
    were_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise ModelLoadError(f"there is not enough memory to convert {name}: {error}") from error
    except Exception as error:  # transformers and gguf raise whatever a damaged file makes them stumble over
        raise ModelLoadError(f"the GGUF file of {name} can't be converted: {type(error).__name__}: {error}") from error


@contextmanager
def _without_tensor_bar() -> Iterator[None]:
    """Take away the bar of transformers' GGUF reader, which obeys none of its switches."""
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:  # another release of transformers, without that bar
        yield
        return
    reader.tqdm = lambda tensors, **_: tensors  # type: ignore[attr-defined]
    try:
        yield
    finally:
        reader.tqdm = bar  # type: ignore[attr-defined]


def _unpacked() -> dict[str, Any]:
    # Newer releases keep the blocks packed unless told otherwise, and packed weights can be neither saved nor changed;
    # older ones always unpack and have no such class.
    config_class = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config_class(dequantize=True)} if config_class else {}


def _mend_tokenizer(tokenizer: Any, gguf: Path, config: Any) -> None:
    if tokenizer.model_max_length >= _NO_LIMIT:
        tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    if _pre_tokenizer_name(gguf) in _DIGITS_APART and isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _pre_tokenizer_name(gguf: Path) -> str | None:
    """The metadata field `tokenizer.ggml.pre`: how text is cut before the merges, by llama.cpp's names."""
    key, string_type = b"tokenizer.ggml.pre", 8
    # Found by its bytes (length, key, type, length, value), since gguf's reader takes seconds for a whole vocabulary.
    pattern = struct.pack("<Q", len(key)) + key + struct.pack("<I", string_type)
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(pattern)
        if start < 0:
            return None
        start += len(pattern)
        (length,) = struct.unpack_from("<Q", content, start)
        return content[start + 8 : start + 8 + length].decode("utf-8")
