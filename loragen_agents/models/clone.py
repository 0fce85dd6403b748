"""A second module tree over the tensors of a loaded model."""

import copy

from transformers import PreTrainedModel

from loragen_agents.errors import ModelLoadError


def clone_sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the module tree of `model`; every parameter and buffer of the copy is that of `model` itself.

    A parameter that is then replaced in the copy (`module.weight = ...`), or a module that is wrapped there, leaves
    `model` as it is. What changes a shared tensor in place shows in both.

    Raises:
        ModelLoadError: the model was spread over devices by Accelerate, whose hooks are bound to the original modules.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelLoadError(
            f"{type(model).__name__} is spread over several devices; load it on one device to specialise it"
        )
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
