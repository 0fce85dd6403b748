"""How fast a token is decoded: this package's loop against transformers' `generate`, merged weights, the grammar.

    python -m loragen_agents.bench.decode_speed [--dtype bfloat16] [--tokens 48] [--rounds 7] [--json]

Everything is timed in turn within each round, and ratios are taken round by round, so that they hold on a machine whose
speed drifts. Only decoding counts: the time from the first token that the model chose to the last one. What is written
does not matter here; the merged weights are random. The loop runs on PyTorch, as `generate` does; how it compares with
OpenVINO is the subject of `bench.runtimes`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from loragen_agents.adapter.lora_weights import PROJECTIONS, LoRAWeights
from loragen_agents.conversation.prompts import Turn
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.edge.decoding import Decoder, Sampling
from loragen_agents.edge.grammar import ToolGrammar
from loragen_agents.models.arrangement import arrange_weights
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import DEFAULT_MODEL, gated_ffn_layers, load_language_model
from loragen_agents.registry import ToolRegistry
from loragen_agents.support.console import print_json, results
from loragen_agents.support.content import content_folder

REQUEST = "Tell me everything there is to know about the sea, in as many words as you can."


@dataclass(frozen=True)
class Speeds:
    """Medians over the rounds. Speeds in tokens per second; ratios are medians of the rounds' own ratios.

    Attributes:
        generate, bare, merged: transformers' `generate`, and this package's loop on the bare and on the merged model.
        grammar: the merged model held to the grammar while it writes an answer, where nothing is forced.
        tool_call: the merged model writing calls within the grammar, forced tokens included.
        bandwidth_limit: what reading every weight once a token allows, at the rate at which this machine sums numbers.
    """

    generate: float
    bare: float
    merged: float
    grammar: float
    tool_call: float
    bandwidth_limit: float
    bare_over_generate: float
    merged_over_bare: float
    merged_over_generate: float
    grammar_cost: float
    bare_over_limit: float


def measure_speeds(
    model: PreTrainedModel,
    untouched: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    registry: ToolRegistry,
    *,
    tokens: int = 48,
    rounds: int = 7,
) -> Speeds:
    """Time all ways of decoding in turn, `rounds` times after one that does not count.

    Args:
        untouched: the same model as transformers loads it, for `generate`: `model`, as this package loads it, has its
            weights arranged in memory, which `generate` gains from, too.
    """
    merged = clone_sharing_tensors(model)
    random_weights(model).merge_into(merged)
    arrange_weights(merged, model)
    # The last token of the vocabulary takes the place of the stop tokens, so that texts are of one length.
    never = [model.config.get_text_config(decoder=True).vocab_size - 1]
    decoders = [Decoder(tree, tokenizer, stop_token_ids=never, runtime="torch") for tree in (model, merged)]
    prompt = shared_renderer(tokenizer).user_turn([Turn(REQUEST)])
    answer = ToolGrammar(registry, tokenizer, "none")
    call = ToolGrammar(registry, tokenizer, "any")
    forced = len(answer.matcher(never[0] + 1, never).forced_tokens())
    ways: dict[str, Callable[[], float]] = {
        "generate": lambda: _generate(untouched, prompt, tokens, never[0]),
        "bare": lambda: _decode(decoders[0], prompt, tokens),
        "merged": lambda: _decode(decoders[1], prompt, tokens),
        "grammar": lambda: _decode(decoders[1], prompt, tokens, answer, forced),
        "tool_call": lambda: _calls(decoders[1], prompt, tokens, call),
        "bandwidth_limit": lambda: _read_rate(model),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            speed = way()
            if round_number:
                speeds[name].append(speed)

    def ratio(one: str, other: str) -> float:
        return median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    return Speeds(
        **{name: median(values) for name, values in speeds.items()},
        bare_over_generate=ratio("bare", "generate"),
        merged_over_bare=ratio("merged", "bare"),
        merged_over_generate=ratio("merged", "generate"),
        grammar_cost=1 - ratio("grammar", "merged"),
        bare_over_limit=ratio("bare", "bandwidth_limit"),
    )


def random_weights(model: PreTrainedModel, rank: int = 16) -> LoRAWeights:
    """Small random LoRA weights for every FFN matrix of `model`."""
    generator = torch.Generator().manual_seed(0)
    layers = gated_ffn_layers(model)
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for index, (_, mlp) in enumerate(layers):
        for projection in PROJECTIONS:
            out_size, in_size = getattr(mlp, projection).weight.shape
            a = torch.randn(rank, in_size, generator=generator) / in_size**0.5
            tensors[index, projection] = (a, 0.02 * torch.randn(out_size, rank, generator=generator))
    return LoRAWeights(layers=len(layers), rank=rank, alpha=float(rank), tensors=tensors)


class _Clock(BaseStreamer):
    """Notes when `generate` hands out its tokens; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: PreTrainedModel, prompt: list[int], tokens: int, never: int) -> float:
    clock = _Clock()
    ids = torch.tensor([prompt], device=model.device)
    generate: Any = model.generate
    with torch.inference_mode():
        generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=never,
            pad_token_id=never,
            streamer=clock,
        )
    return (len(clock.times) - 2) / (clock.times[-1] - clock.times[1])


def _decode(
    decoder: Decoder, prompt: list[int], tokens: int, grammar: ToolGrammar | None = None, forced: int = 0
) -> float:
    sampling = Sampling(max_tokens=tokens + forced)
    completion = decoder.generate([prompt], sampling, grammar)[0]
    return (len(completion.token_ids) - forced - 1) / (completion.seconds - completion.first_token_seconds)


def _calls(decoder: Decoder, prompt: list[int], tokens: int, grammar: ToolGrammar) -> float:
    """Calls, one after another, until they have as many tokens as the other texts."""
    written, seconds = 0, 0.0
    while written < tokens:
        completion = decoder.generate([prompt], Sampling(max_tokens=tokens, temperature=1.0, seed=written), grammar)[0]
        written += len(completion.token_ids)
        seconds += completion.seconds
    return written / seconds


def _read_rate(model: PreTrainedModel) -> float:
    """Times a second that all weights could be read, at the rate at which a large tensor is summed."""
    numbers = torch.ones(2**26, device=model.device)
    numbers.sum()
    started = time.perf_counter()
    numbers.sum().item()
    rate = numbers.nbytes / (time.perf_counter() - started)
    read = {id(tensor): tensor.nbytes for tensor in model.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:  # only one row of it is read
        del read[id(embedding)]
    return rate / sum(read.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loragen_agents.bench.decode_speed", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="known name, folder, GGUF file or Hub id")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 or auto (default)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens written each time (default: 48)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    language_model = load_language_model(options.model, dtype=options.dtype)
    untouched: Any = AutoModelForCausalLM.from_pretrained(
        language_model.folder, dtype=language_model.model.dtype, local_files_only=True
    )
    untouched.to(language_model.device)
    registry = ToolRegistry.from_yaml(content_folder("tools") / "gpt4tools_seen.yaml")
    tokenizer = language_model.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    speeds = measure_speeds(
        language_model.model, untouched.eval(), tokenizer, registry, tokens=options.tokens, rounds=options.rounds
    )
    threads, dtype = torch.get_num_threads(), str(language_model.model.dtype).removeprefix("torch.")
    if options.json:
        print_json({"model": language_model.name, "dtype": dtype, "threads": threads, **asdict(speeds)})
        return
    table = Table(title=f"Decoding {language_model.name}, {dtype}, {threads} thread{'s' * (threads > 1)}")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    table.add_column("ratio", justify="right")
    limit = f"{speeds.bare_over_limit:.0%} of the limit"
    table.add_row("transformers' generate, bare model", f"{speeds.generate:.1f}", "1")
    table.add_row("this loop, bare model", f"{speeds.bare:.1f}", f"{speeds.bare_over_generate:.2f} x generate, {limit}")
    table.add_row("this loop, merged model", f"{speeds.merged:.1f}", f"{speeds.merged_over_bare:.2f} x bare")
    table.add_row("merged, answer within the grammar", f"{speeds.grammar:.1f}", f"{speeds.grammar_cost:+.1%} cost")
    table.add_row("merged, tool call within the grammar", f"{speeds.tool_call:.1f}", "forced tokens included")
    table.add_row("reading the weights once a token", f"{speeds.bandwidth_limit:.1f}", "the limit")
    results.print(table)


if __name__ == "__main__":
    main()
