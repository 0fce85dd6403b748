"""`loragen-agents specialize`: a registry file to LoRA weights that hold it, written for one of several runtimes."""

import argparse
from typing import TYPE_CHECKING, Any

from loragen_agents.commands.options import (
    UNTRAINED,
    add_specialization_options,
    load_parts,
    load_registry,
    output_folder,
)

if TYPE_CHECKING:
    from loragen_agents.specialization.specialize import Specialization

NAME = "specialize"
HELP = "turn a tool registry into LoRA weights and write them for peft, llama.cpp, Ollama or OpenVINO, or merged"
# How the files are loaded, by format.
_LOAD = {
    "peft": "load with peft.PeftModel.from_pretrained(model, {out!r})",
    "gguf": "load with llama-server --lora {out}/adapter.gguf, or ollama create -f {out}/Modelfile",
    "merged": "load with transformers.AutoModelForCausalLM.from_pretrained({out!r})",
    "openvino": "load with openvino.compile_model('{out}/openvino_model.xml', 'CPU')",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_specialization_options(parser)
    parser.add_argument("--out", required=True, type=output_folder, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--format",
        default="peft",
        choices=tuple(_LOAD),
        help="peft, gguf (llama.cpp, Ollama), merged (a model) or openvino (its graph)",
    )


def run(arguments: argparse.Namespace) -> int:
    from loragen_agents.specialization.exports import export
    from loragen_agents.specialization.specialize import specialize
    from loragen_agents.support.console import print_json
    from loragen_agents.support.progress import shown, silent

    registry = load_registry(arguments.tools)
    with shown(silent if arguments.json else None) as progress:
        parts = load_parts(arguments, progress, service=False)
        edge, cloud, generator = parts["model"], parts["cloud"], parts["generator"]
        progress("Specialising", None)
        # What this command reports is the work itself, so nothing comes from or goes to the cache.
        made = specialize(registry, arguments.system, edge=edge, cloud=cloud, generator=generator, cache=False)
        progress("Writing", None)
        files = export(made, edge, arguments.out, arguments.format)
    report = {
        "out": str(arguments.out),
        "format": arguments.format,
        "files": [path.name for path in files],
        **_figures(made),
        "edge": edge.name,
        "cloud": cloud.name,
        "generator": arguments.generator,
        "generator_fingerprint": generator.fingerprint,
        "bytes": sum(path.stat().st_size for path in files),
    }
    if arguments.json:
        print_json(report)
    else:
        _show(report)
    return 0


def _figures(made: "Specialization") -> dict[str, Any]:
    """What was specialised on, what it took, and the sizes of the weights."""
    pairs = made.weights.tensors.values()
    return {
        "tools": list(made.registry.names),
        "input_format": made.registry.input_format,
        "registry_fingerprint": made.registry.fingerprint,
        "system_text": made.system_text,
        "definition_tokens": made.definition_tokens,
        "milliseconds": round(made.seconds * 1000, 1),
        "matrices": len(pairs),
        "rank": max((a.shape[0] for a, _ in pairs), default=0),
        "parameters": sum(a.numel() + b.numel() for a, b in pairs),
        "untrained": made.weights_are_zero,
    }


def _show(report: dict[str, Any]) -> None:
    from loragen_agents.support.console import say

    say(report["out"], style="bold")
    rows = [
        ("tools", f"{len(report['tools'])}: {', '.join(report['tools'])}"),
        ("definitions", f"{report['definition_tokens']} tokens that prompts no longer hold"),
        ("models", f"edge {report['edge']}, cloud {report['cloud']}, generator {report['generator']}"),
        ("time", f"{report['milliseconds']:.0f} ms to generate and merge"),
        ("weights", f"{report['matrices']} matrices, rank {report['rank']}, {report['parameters']:,} parameters"),
        ("files", f"{', '.join(report['files'])} ({report['bytes'] / 1e6:.1f} MB)"),
        ("use", _LOAD[report["format"]].format(out=report["out"])),
    ]
    for title, text in rows:
        say(f"  {title:<13}{text}")
    if report["untrained"]:
        say(UNTRAINED, style="yellow")
