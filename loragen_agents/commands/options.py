"""Options that several commands share: the registry file, the two language models and the generator.

Imports nothing slow until the options are used.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragen_agents.errors import RegistryError
from loragen_agents.support.content import content_folder

UNTRAINED = (
    "This generator is not trained yet: its LoRA weights are zero, so the step is the bare model's and says nothing "
    "about the product's quality."
)

if TYPE_CHECKING:
    from loragen_agents.registry import ToolRegistry
    from loragen_agents.support.progress import Progress


def add_specialization_options(parser: argparse.ArgumentParser) -> None:
    """Add --tools, --system and what `load_parts` reads."""
    parser.add_argument(
        "--tools", required=True, metavar="FILE", help="registry: a YAML file, or the name of a shipped one"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system text, compressed with the tools")
    parser.add_argument("--edge", metavar="MODEL", help="the small LM (name, Hub id, folder, GGUF file)")
    parser.add_argument(
        "--cloud", metavar="MODEL", help="the LM that reads the definitions (the edge LM), or the URL of a service"
    )
    parser.add_argument("--generator", default="default", metavar="FOLDER", help="generator checkpoint")
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --dtype."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of both LMs (auto: $LORAGEN_AGENTS_DTYPE, or what this machine is fast in)",
    )


def output_folder(text: str) -> Path:
    """An argparse type: the path of a folder to write to, which is not empty (that would be the current folder)."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the path of a folder, got an empty text (. is the current folder)")
    return Path(text)


def load_registry(given: str) -> "ToolRegistry":
    """The registry of a file, or of the shipped file of that name (`gpt4tools_seen`).

    Raises:
        RegistryError: there is no such file, or it can't be read.
    """
    from loragen_agents.registry import ToolRegistry

    path = Path(given)
    shipped = content_folder("tools") / f"{given.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        if path.name != given or not shipped.is_file():
            names = ", ".join(sorted(file.stem for file in content_folder("tools").glob("*.yaml")))
            raise RegistryError(f"there is no registry file {given}; expected a YAML file, or one of: {names}")
        path = shipped
    return ToolRegistry.from_yaml(path)


def load_parts(arguments: argparse.Namespace, progress: "Progress | None", *, service: bool = True) -> dict[str, Any]:
    """The models and the generator that the options name; see `chat.loading.load_parts`."""
    from loragen_agents.chat import loading

    return loading.load_parts(
        arguments.edge,
        arguments.cloud,
        arguments.generator,
        device=arguments.device,
        dtype=arguments.dtype,
        service=service,
        progress=progress,
    )
