"""The variants of the table: what each puts into the prompt, whose weights it runs, and how it decodes.

A variant's name is a base and options, `lora-gen+grammar`. Knows the command that makes a variant's weights, not how
they are loaded or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loragen_agents.errors import DataError

Source = Literal["none", "peft", "generator", "embedding"]


@dataclass(frozen=True)
class Base:
    """What a variant is before options.

    Attributes:
        definitions: whether tool definitions stand in the prompt.
        source: where its weights come from: none (the bare model), a PEFT folder, a generator checkpoint, or a sentence
            encoder that stands in for the model.
    """

    title: str
    definitions: bool
    source: Source


BASES: dict[str, Base] = {
    "definitions": Base("Bare model, definitions in the prompt", True, "none"),
    "bare": Base("Bare model, no definitions", False, "none"),
    "lora-definitions": Base("LoRA, definitions in the prompt", True, "peft"),
    "lora": Base("LoRA, no definitions", False, "peft"),
    "lora-gen": Base("LoRA-Gen, not trained on these tools' family", False, "generator"),
    "lora-gen-trained": Base("LoRA-Gen, trained on these tools' family", False, "generator"),
    "minilm": Base("all-MiniLM-L6-v2, nearest name and description", False, "embedding"),
}
OPTIONS: dict[str, str] = {
    "cached": "prefix kept in the KV cache",
    "grammar": "held to the registry's grammar",
    "choice": "tool chosen by scoring all names",
    "match": "tool chosen by the tool head",
}
REFERENCE, CACHED_REFERENCE = "definitions", "definitions+cached"
DEFAULT_VARIANTS: tuple[str, ...] = (
    REFERENCE,
    CACHED_REFERENCE,
    "definitions+grammar",
    "bare",
    "lora-definitions",
    "lora",
    "lora-gen",
    "lora-gen+grammar",
    "lora-gen+match",
    "lora-gen-trained",
    "lora-gen-trained+grammar",
    "lora-gen-trained+match",
)
CHOICE_VARIANTS: tuple[str, ...] = ("lora-gen+match", "minilm")


@dataclass(frozen=True)
class Variant:
    """One variant of the table."""

    name: str
    base: Base
    options: frozenset[str]

    @property
    def base_name(self) -> str:
        return self.name.split("+")[0]

    @property
    def title(self) -> str:
        said = [text for option, text in OPTIONS.items() if option in self.options]
        return ", ".join([self.base.title, *said])

    @property
    def definitions(self) -> bool:
        return self.base.definitions

    @property
    def cached(self) -> bool:
        return "cached" in self.options

    @property
    def grammar(self) -> bool:
        """Whether the text is held to the grammar; where tools are scored it holds the chosen one's arguments."""
        return "grammar" in self.options or self.choice

    @property
    def choice(self) -> bool:
        """Whether all tools are scored, by their names at least."""
        return "choice" in self.options or self.match

    @property
    def match(self) -> bool:
        """Whether the tool head chooses, which is what the product does."""
        return "match" in self.options

    @property
    def embedding(self) -> bool:
        """Whether a sentence encoder stands in for the model."""
        return self.base.source == "embedding"


def variant_from_name(name: str) -> Variant:
    """Read a variant's name.

    Raises:
        DataError: no such base or option, or an option that the base can't have.
    """
    base_name, *options = name.strip().split("+")
    if base_name not in BASES:
        raise DataError(f"There is no variant {name!r}: expected one of {', '.join(BASES)}, with options {_options()}.")
    base = BASES[base_name]
    for option in options:
        if option not in OPTIONS:
            raise DataError(f"Variant {name!r}: no option {option!r}; expected {_options()}.")
    if "cached" in options and not base.definitions:
        raise DataError(f"Variant {name!r}: only a prompt with definitions has a prefix to keep; leave '+cached' out.")
    if "match" in options and base.source != "generator":
        raise DataError(f"Variant {name!r}: only a generator has a tool head; leave '+match' out.")
    if base.source == "embedding" and options:
        raise DataError(f"Variant {name!r}: a sentence encoder takes no options; write {base_name!r}.")
    ordered = [option for option in OPTIONS if option in options]
    return Variant("+".join([base_name, *ordered]), base, frozenset(ordered))


def variants_from_names(names: Sequence[str]) -> list[Variant]:
    """Read several names; every variant once, in the order given."""
    variants = {variant.name: variant for variant in map(variant_from_name, names)}
    if not variants:
        raise DataError(f"No variants: name at least one, for example {REFERENCE}.")
    return list(variants.values())


def check_variants(variants: Sequence[Variant], *, choice_only: bool) -> None:
    """See whether the variants do what is asked of them: only the choice of a tool, or whole steps.

    Raises:
        DataError: a variant can't; the message names it.
    """
    for variant in variants:
        if choice_only and not (variant.choice or variant.embedding):
            raise DataError(f"Variant {variant.name!r} chooses no tool before it writes: add '+match' or '+choice'.")
        if not choice_only and variant.embedding:
            raise DataError(f"Variant {variant.name!r} only chooses a tool, it writes nothing: add --choice-only.")


@dataclass(frozen=True)
class Weights:
    """Where a base's weights are (a folder, or "default": the shipped checkpoint) and the command that makes them."""

    location: str
    command: str | None = None


def _options() -> str:
    return ", ".join(f"'+{option}' ({text})" for option, text in OPTIONS.items())
