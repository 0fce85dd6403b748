"""The generator: system prompt -> meta-token states -> gates -> LoRA weights of the edge LM (paper section 3.2).

Ties the parts of this room together in one `nn.Module` that can be trained, saved and loaded. A system prompt is plain
text here; a registry is read by the tool memory and the heads. Knows nothing of LangChain.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from loragen_agents.adapter.argument_reader import ArgumentKeys
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.registry_weights import RegistryWeights
from loragen_agents.adapter.tool_keys import ToolKeys
from loragen_agents.adapter.tool_updates import MappedUpdates, ToolUpdates
from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.errors import CheckpointError
from loragen_agents.generator.argument_head import ArgumentHead, ArgumentIndexer, layers_read, value_width
from loragen_agents.generator.checkpoint import (
    Description,
    ModelIdentity,
    fingerprint,
    read_description,
    read_tensors,
    resolve,
    write_checkpoint,
)
from loragen_agents.generator.config import GeneratorConfig
from loragen_agents.generator.experts import DirectProjection, ExpertPool, FFNShape, LayerMatrices
from loragen_agents.generator.memory_writer import MemoryWriter
from loragen_agents.generator.meta_tokens import MetaTokens
from loragen_agents.generator.router import Router, gumbel_top_k, keep_top_k, load_loss
from loragen_agents.generator.tool_head import ToolHead, ToolIndexer
from loragen_agents.generator.tool_memory import ToolMemory
from loragen_agents.generator.tool_reading import TextReader
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.registry import ToolRegistry


@dataclass(frozen=True, eq=False)
class Generated:
    """What the generator makes of a batch of system prompts, with gradients.

    Attributes:
        matrices: projection -> A (registries, layers, r, in) and B (registries, layers, out, r).
        gates: (registries, layers, n); None in the direct variant.
        load_loss: Eq. 9, a scalar; 0 where nothing is routed.
    """

    matrices: LayerMatrices
    gates: Tensor | None
    load_loss: Tensor
    alpha: float

    @property
    def weights(self) -> list[LoRAWeights]:
        """The LoRA weights of each registry, as views of `matrices`; `apply_lora` takes the list."""
        # With unbind: for each layer, the backward pass of indexing makes a tensor of zeros as large as all layers.
        split = {
            projection: [list(zip(a.unbind(0), b.unbind(0), strict=True)) for a, b in zip(*pair, strict=True)]
            for projection, pair in self.matrices.items()
        }
        some = split["gate_proj"]
        return [
            LoRAWeights(
                len(layers),
                layers[0][0].shape[0],
                self.alpha,
                {(layer, name): own[n][layer] for layer in range(len(layers)) for name, own in split.items()},
            )
            for n, layers in enumerate(some)
        ]


class LoRAGenerator(nn.Module):
    """Makes LoRA weights of an edge LM from a system prompt. Starts in evaluation mode, with LoRA output zero.

    Args:
        cloud: the LM that reads; may be the edge LM itself, whose forward stays what it was. None is allowed where
            `config.uses_cloud` is False.
        edge: the LM that the weights are for. Neither LM's own weights are ever changed.

    Raises:
        ValueError: the config needs a cloud LM and none is given, or wants more memory layers than the edge LM has.
        ModelLoadError: a model lacks the projections that the method works on.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        cloud: LanguageModel | None,
        edge: LanguageModel,
    ) -> None:
        super().__init__()
        self.config, self.cloud, self.edge = config, cloud, edge
        self.notes: dict[str, Any] = {}
        self.shape = FFNShape.of(edge.model)
        _check_layers(config, self.shape.layers)
        self.meta_tokens: MetaTokens | None = None
        self._renderer: PromptRenderer | None = None
        if config.uses_cloud:
            if cloud is None:
                raise ValueError(f"{config.n_experts} experts have to be chosen from, which needs a cloud LM")
            self.meta_tokens = self._new_meta_tokens(cloud)
            self._renderer = shared_renderer(cloud.tokenizer)
            self._head: list[int] = cloud.tokenizer("", add_special_tokens=True).input_ids
        # The two models may be on different devices; the parts that work on the cloud LM's states are on its device.
        device = (cloud or edge).model.device
        self.producer = self._new_producer().to(device)
        self.router: Router | None = None
        if self.meta_tokens is not None and config.generation == "meta_token":
            layers = self.shape.layers if config.expert_scope == "per_layer" else None
            self.router = Router(self.meta_tokens.width, config.router_width, config.n_experts, layers).to(device)
        self.tool_head = self._new_tool_head() if config.head_layers else None
        self.argument_head = self._new_argument_head() if config.argument_layers else None
        self.tool_memory = self._new_tool_memory() if config.memory_layers else None
        self._fingerprint: tuple[tuple[int, ...], str] | None = None
        self._shared: tuple[str, LoRAWeights] | None = None
        self._lock = Lock()
        self.eval()

    def _new_meta_tokens(self, cloud: LanguageModel) -> MetaTokens:
        config = self.config
        return MetaTokens(
            cloud.model,
            self.shape.layers,
            rank=config.cloud_rank,
            alpha=config.cloud_alpha,
            dropout=config.cloud_dropout,
        )

    def _new_producer(self) -> ExpertPool | DirectProjection:
        config = self.config
        if config.generation == "direct":
            assert self.meta_tokens is not None
            return DirectProjection(self.meta_tokens.width, config.direct_width, self.shape, config.rank)
        per_layer = config.expert_scope == "per_layer"
        return ExpertPool(self.shape, config.n_experts, config.rank, per_layer=per_layer)

    def _new_tool_head(self) -> ToolIndexer:
        config = self.config
        head = ToolHead(self._last_layers(config.head_layers), self.shape.intermediate, config.head_width)
        return ToolIndexer(self.edge, head, keep=self._kept(4096))

    def _new_argument_head(self) -> ArgumentIndexer:
        config = self.config
        layers = layers_read(config.argument_layers, self.shape.layers)
        head = ArgumentHead(layers, value_width(self.edge.model), config.argument_width, config.argument_hidden)
        return ArgumentIndexer(self.edge, head)

    def _new_tool_memory(self) -> MemoryWriter:
        config = self.config
        memory = ToolMemory(
            self._last_layers(config.memory_layers),
            self.shape.hidden,
            self.shape.intermediate,
            config.memory_common_rank,
            config.memory_key_rank,
            config.memory_value_rank,
        )
        return MemoryWriter(self.edge, memory, keep=self._kept(128))

    def _last_layers(self, count: int) -> range:
        return range(self.shape.layers - count, self.shape.layers)

    def _kept(self, tools: int) -> int:
        """How many tools' readings are cached: none where the expert weights differ from registry to registry."""
        return 0 if self.config.uses_cloud else tools

    # Generating

    def forward(self, system_prompts: Sequence[str]) -> Generated:
        """LoRA weights for a batch of registries, with gradients to everything that is trained.

        In training mode: dropout in the cloud LM's LoRA, batch statistics in the router, Gumbel noise where routing
        calls for it.

        Raises:
            PromptError: a system prompt is longer than the cloud LM's context.
        """
        return self._produce(self._states(system_prompts, merged=False), len(system_prompts))

    def generate(self, system_prompt: str, registry: ToolRegistry | None = None) -> LoRAWeights:
        """LoRA weights for one registry as one sum: the same for the same prompt, from one pass of the cloud LM.

        Args:
            registry: what a generator with a tool memory reads; others have no use for it.

        Raises:
            PromptError: the system prompt is longer than the cloud LM's context.
            RuntimeError: the generator is in training mode, in which its output is random.
        """
        return self.generate_parts(system_prompt, registry).combined()

    @torch.no_grad()
    def generate_parts(
        self,
        system_prompt: str,
        registry: ToolRegistry | None = None,
        *,
        vectors: Tensor | None = None,
        shared: LoRAWeights | None = None,
        reader: TextReader | None = None,
    ) -> RegistryWeights:
        """As `generate`, in parts: shared weights, the keys that choose a tool, and each tool's own updates.

        Args:
            system_prompt, registry: as `generate`.
            vectors: of the registry's tools, where they are known from before: then no tool is read for the keys.
            shared: the shared weights, where they are known from before.
            reader: reads the registry's tools, with these shared weights in place; transformers' modules if left out.
        """
        if self.training:
            raise RuntimeError("the generator is in training mode; call eval() before generate()")
        shared = self.shared_weights(system_prompt) if shared is None else shared
        keys: ToolKeys | None = None
        if self.tool_head is not None and registry:
            keys = self.tool_head(registry, shared, reader) if vectors is None else self.tool_head.keys(vectors)
        memory, reads = self.tool_memory, self.argument_head
        if not registry:
            return RegistryWeights(shared, keys, lambda: shared)
        tools, beside = registry, shared

        def arguments(tool: str) -> ArgumentKeys:
            assert reads is not None
            return reads(tools[tool], beside, reader)

        read = None if reads is None else arguments
        if memory is None:
            return RegistryWeights(shared, keys, lambda: shared, arguments=read)

        @torch.no_grad()
        def mapped(names: Sequence[str]) -> list[MappedUpdates]:
            some = ToolRegistry([tools[name] for name in names], input_format=tools.input_format)
            return memory.mapped(some, beside, reader)

        updates = ToolUpdates(tools.names, self.shape.layers, memory.memory.value_maps, mapped)
        return RegistryWeights.of_tools(shared, keys, updates, read)

    @torch.no_grad()
    def shared_weights(self, system_prompt: str) -> LoRAWeights:
        """The experts' part for one registry. Where nothing is routed, it is one object until the weights change.

        Raises:
            PromptError: the system prompt is longer than the cloud LM's context.
        """
        if self.config.uses_cloud:
            return self._produce(self._states([system_prompt], merged=True), 1).weights[0].detach()
        with self._lock:
            if self._shared is None or self._shared[0] != self.fingerprint:
                self._shared = (self.fingerprint, self._produce(None, 1).weights[0].detach())
            return self._shared[1]

    def encode(self, system_prompt: str) -> list[int]:
        """Token ids of a system prompt as the cloud LM reads it; control tokens in it are plain text.

        In front stands what the cloud LM's tokenizer puts before any text: a BOS token, or nothing.
        """
        assert self._renderer is not None, "a generator without a cloud LM reads no system prompt"
        return [*self._head, *self._renderer.encode_text(system_prompt)]

    def _states(self, system_prompts: Sequence[str], *, merged: bool) -> Tensor | None:
        if self.meta_tokens is None:
            return None
        prompts = [self.encode(prompt) for prompt in system_prompts]
        return self.meta_tokens.merged_states(prompts) if merged else self.meta_tokens(prompts)

    def _produce(self, states: Tensor | None, registries: int) -> Generated:
        config = self.config
        if isinstance(self.producer, DirectProjection):
            assert states is not None
            matrices = self.producer(states)
            return Generated(matrices, None, next(iter(matrices.values()))[0].new_zeros(()), config.alpha)
        if self.router is None or states is None:
            some = next(self.producer.parameters())
            gates = some.new_ones(registries, self.shape.layers, 1)
            return Generated(self.producer(gates), gates, gates.new_zeros(()), config.alpha)
        logits = self.router(states)
        if config.routing == "gumbel_top_k":
            gates = gumbel_top_k(logits, config.top_k, noise=self.training)
        else:
            gates = keep_top_k(logits, config.top_k)
        loss = load_loss(gates, config.load_coefficient, pools_per_layer=config.expert_scope == "per_layer")
        return Generated(self.producer(gates), gates, loss, config.alpha)

    # Saving and loading

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors that are the generator's own, by name: all but the frozen weights of the cloud LM."""
        cloud = "meta_tokens.cloud."
        return {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if not name.startswith(cloud) or ".lora_" in name
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over config, both models' identities and tensors: equal fingerprints generate equal weights."""
        tensors = self.own_tensors()
        version = tuple(tensor._version for tensor in tensors.values())
        if self._fingerprint is None or self._fingerprint[0] != version:
            description = self._describe()
            identity = {"config": description.config, "edge": asdict(description.edge)}
            if description.cloud is not None:
                identity["cloud"] = asdict(description.cloud)
            self._fingerprint = (version, fingerprint(identity, tensors))
        return self._fingerprint[1]

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write a checkpoint: matrices in `dtype` (float32 or bfloat16), config, both models' identities, `notes`."""
        target = Path(folder)
        write_checkpoint(target, self._describe(), self.own_tensors(), dtype)
        return target

    @classmethod
    def load(
        cls,
        folder: str | Path,
        cloud: LanguageModel | None,
        edge: LanguageModel,
        *,
        allow_other_weights: bool = False,
    ) -> "LoRAGenerator":
        """Load a checkpoint ("default": the one that ships with the package) for the models it was made for.

        Args:
            allow_other_weights: accept models of the same shapes whose weights are not those of the training.

        Raises:
            CheckpointError: a file is missing or damaged, or the checkpoint was made for other models.
        """
        source = resolve(folder)
        description = read_description(source)
        try:
            config = GeneratorConfig.from_dict(description.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source / 'generator.json'}: {error}") from error
        description.edge.check(ModelIdentity.of(edge), "edge", source, allow_other_weights=allow_other_weights)
        if config.uses_cloud:
            if cloud is None or description.cloud is None:
                raise CheckpointError(f"{source} needs a cloud LM, and none is {'given' if cloud is None else 'named'}")
            description.cloud.check(ModelIdentity.of(cloud), "cloud", source, allow_other_weights=allow_other_weights)
        generator = cls(config, cloud, edge)
        own = generator.own_tensors()
        with torch.no_grad():
            for name, tensor in read_tensors(source, own).items():
                own[name].copy_(tensor)
        generator.notes = description.notes
        return generator

    def _describe(self) -> Description:
        cloud = ModelIdentity.of(self.cloud) if self.cloud is not None and self.config.uses_cloud else None
        return Description(asdict(self.config), ModelIdentity.of(self.edge), cloud, self.notes)


def _check_layers(config: GeneratorConfig, layers: int) -> None:
    """Raise ValueError where a head or the memory wants more layers than the edge LM has."""
    for name in ("memory_layers", "head_layers"):
        if getattr(config, name) > layers:
            raise ValueError(f"{name} is {getattr(config, name)}, and the edge LM has {layers} layers")
    if 2 * config.argument_layers > layers:
        raise ValueError(
            f"argument_layers is {config.argument_layers}, and the edge LM has {layers} layers, of which every second "
            "one can be read"
        )
