"""The cloud LM reads a system prompt and writes what it makes of it into L meta tokens (paper section 3.2).

One causal pass over the prompt followed by L learnt embeddings; the last hidden states at those L places are the
meta-token states, one for each layer of the edge LM. The cloud LM's q and v projections carry a LoRA of their own. What
the states are used for, this module does not know.
"""

import threading
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from loragen_agents.errors import ModelLoadError, PromptError
from loragen_agents.models.clone import clone_sharing_tensors

TARGETS = ("q_proj", "v_proj")


class MetaTokens(nn.Module):
    """Meta-token states of system prompts, from a cloud LM whose frozen weights are shared with its other users.

    The LoRA lives in a module tree of its own, so the cloud LM that is handed in, which may be the edge LM too, goes on
    computing what it did before.

    Args:
        cloud: a causal LM.
        count: number L of meta tokens.
        rank, alpha, dropout: of the LoRA on q and v.

    Raises:
        ModelLoadError: the cloud LM has no q_proj and v_proj.
    """

    def __init__(self, cloud: PreTrainedModel, count: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        # In a tuple, so that torch does not count the original tree among this module's own.
        self._original = (cloud,)
        self.cloud = clone_sharing_tensors(cloud)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(TARGETS))  # type: ignore[arg-type]
        try:
            inject_adapter_in_model(config, self.cloud)
        except ValueError as error:
            raise ModelLoadError(f"{type(cloud).__name__} can't be the cloud LM: {error}") from error
        for name, parameter in self.cloud.named_parameters():
            # Adam's small steps are lost in bf16.
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        # Where embedded words lie, so that the first layers meet numbers of the size they know. Through the module, as
        # some families scale what they look up.
        embed = cloud.get_input_embeddings()
        words = cloud.config.get_text_config().vocab_size
        with torch.no_grad():
            sample = embed(torch.arange(0, words, max(1, words // 4096), device=cloud.device)).float()
        start = sample.mean(0) + sample.std(0) * torch.randn(count, sample.shape[1], device=sample.device)
        self.embeddings = nn.Parameter(start)
        self._merged: tuple[tuple[int, ...], PreTrainedModel] | None = None
        self._lock = threading.Lock()

    @property
    def width(self) -> int:
        """Width H of a state."""
        return self.embeddings.shape[1]

    def forward(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """States with gradients to the meta-token embeddings and to the LoRA on q and v.

        Args:
            prompts: token ids of each registry's system prompt.

        Returns:
            The states in float32, with shape (registries, L, H).

        Raises:
            PromptError: a prompt and the meta tokens are longer than the cloud LM's context.
        """
        return self._states(self.cloud, prompts)

    @torch.no_grad()
    def merged_states(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The states without gradients or dropout, through q and v with the LoRA merged: a pass of the bare LM's cost.

        The merge is made once and again after the LoRA has changed. Same arguments, result and errors as `forward`.
        """
        return self._states(self._merged_cloud(), prompts)

    def _states(self, cloud: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
        count = len(self.embeddings)
        lengths = [len(prompt) for prompt in prompts]
        limit = getattr(cloud.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and max(lengths) + count > limit:
            raise PromptError(
                f"the system prompt has {max(lengths)} tokens, and the cloud LM takes {limit - count} beside its "
                f"{count} meta tokens; use fewer or shorter tool definitions, or a cloud LM with a longer context"
            )
        embed = cloud.get_input_embeddings()
        device = cloud.device
        # The meta tokens follow each prompt at once and the padding comes last: no causal position sees it, so a
        # registry's states are the same alone and in a batch, and the pass needs no mask.
        ids = torch.zeros(len(prompts), max(lengths) + count, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
        places = torch.tensor(lengths)[:, None] + torch.arange(count)
        rows = torch.arange(len(prompts))[:, None]
        inputs = embed(ids.to(device))
        places, rows = places.to(device), rows.to(device)
        inputs = inputs.index_put((rows, places), self.embeddings.to(inputs.dtype))
        hidden = cloud.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return hidden[rows, places].float()

    def _merged_cloud(self) -> PreTrainedModel:
        adapters = {name: module for name, module in self.cloud.named_modules() if isinstance(module, LoraLinear)}
        # Optimiser steps and loading count a tensor's version up.
        version = tuple(p._version for name, p in self.cloud.named_parameters() if ".lora_" in name)
        with self._lock:
            if self._merged is None or self._merged[0] != version:
                merged = clone_sharing_tensors(self._original[0]).eval()
                for name, adapter in adapters.items():
                    delta = adapter.get_delta_weight("default")
                    if delta.any():
                        linear = merged.get_submodule(name)
                        weight = (linear.weight.float() + delta).to(linear.weight.dtype)
                        linear.weight = nn.Parameter(weight, requires_grad=False)
                self._merged = (version, merged)
            return self._merged[1]

    def train(self, mode: bool = True) -> "MetaTokens":
        """Switch between training and evaluation; either way the merged weights are made afresh when next needed."""
        self._merged = None
        return super().train(mode)
