"""Settings of a generator, checked when they are made. Knows no tensors and no models."""

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of a generator; the defaults are the paper's (section 4.2 and Table 10) where it gives a figure.

    Attributes:
        generation: "meta_token" routes experts, "direct" projects the states straight to weights (Table 9).
        n_experts, top_k: n and K of Eq. 6. With one expert every gate is 1 and the cloud LM is not used.
        expert_scope: "shared" is one pool and router for all layers, "per_layer" one of each for every layer.
        routing: "keep_top_k" (Eq. 6 and 7) or "gumbel_top_k" (Eq. 4 and 5, Table 8).
        rank, alpha: of the LoRA weights that are generated.
        load_coefficient: alpha of Eq. 9.
        router_width: width between f1 and f2 of Eq. 3 (the paper gives none).
        direct_width: width inside the feed-forward net of the direct variant (the paper gives none).
        cloud_rank, cloud_alpha, cloud_dropout: of the cloud LM's own LoRA on q and v.
        memory_layers: how many of the edge LM's last layers hold updates of the tool memory; 0 is the paper's
            generator.
        memory_common_rank, memory_key_rank, memory_value_rank: widths of the memory's maps (see `ToolMemory`).
        head_layers: how many of the edge LM's last layers the tool head looks at; 0 is no head: names are scored.
        head_width: numbers that each layer and place gives to a tool's vector (see `ToolHead`).
        argument_layers: in how many of the edge LM's layers the argument head looks, every second one of the last; 0 is
            no such head: the model alone decides which arguments it gives.
        argument_width: numbers in each part of an argument's vector (see `ArgumentReader`).
        argument_hidden: numbers that it brings a request's token to, a multiple of 4.

    Raises:
        ValueError: a value is out of its range.
    """

    generation: Literal["meta_token", "direct"] = "meta_token"
    n_experts: int = 8
    top_k: int = 2
    expert_scope: Literal["shared", "per_layer"] = "shared"
    routing: Literal["keep_top_k", "gumbel_top_k"] = "keep_top_k"
    rank: int = 16
    alpha: float = 16.0
    load_coefficient: float = 0.01
    router_width: int = 256
    direct_width: int = 64
    cloud_rank: int = 16
    cloud_alpha: float = 16.0
    cloud_dropout: float = 0.05
    memory_layers: int = 0
    memory_common_rank: int = 64
    memory_key_rank: int = 32
    memory_value_rank: int = 32
    head_layers: int = 0
    head_width: int = 64
    argument_layers: int = 0
    argument_width: int = 128
    argument_hidden: int = 192

    def __post_init__(self) -> None:
        choices = {
            "generation": ("meta_token", "direct"),
            "expert_scope": ("shared", "per_layer"),
            "routing": ("keep_top_k", "gumbel_top_k"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}")
        memory = ("memory_common_rank", "memory_key_rank", "memory_value_rank")
        widths = (*memory, "head_width", "argument_width", "argument_hidden")
        may_be_none = ("memory_layers", "head_layers", "argument_layers")
        for name in ("n_experts", "top_k", "rank", "router_width", "direct_width", "cloud_rank", *widths, *may_be_none):
            value, least = getattr(self, name), 0 if name in may_be_none else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number from {least}")
        if self.argument_hidden % 4:
            raise ValueError(f"argument_hidden is {self.argument_hidden}; expected a multiple of 4")
        if self.top_k > self.n_experts and self.n_experts > 1:
            raise ValueError(f"top_k is {self.top_k}, and there are {self.n_experts} experts to choose from")
        for name in ("alpha", "cloud_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a positive number")
        if not 0 <= self.cloud_dropout < 1 or self.load_coefficient < 0:
            raise ValueError("cloud_dropout must lie in [0, 1) and load_coefficient must not be negative")

    @property
    def uses_cloud(self) -> bool:
        """Whether a cloud LM has to read the system prompt: not where a single expert leaves nothing to choose."""
        return self.generation == "direct" or self.n_experts > 1

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GeneratorConfig":
        """The inverse of `dataclasses.asdict`.

        Raises:
            ValueError: there is a setting that this version does not know, or a value out of range.
        """
        unknown = sorted(values.keys() - {one.name for one in fields(cls)})
        if unknown:
            raise ValueError(f"unknown generator settings: {', '.join(unknown)}")
        return cls(**values)
