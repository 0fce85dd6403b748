"""Language models and generators, loaded once for all who use the same one at the same time.

They are freed with their last user: a caller, or a specialisation in memory (see `specialize`). The generator that was
asked for last stays loaded, so that the next call finds it.
"""

import torch

from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.specialization.shared_values import UsedValues

_language_models: UsedValues[LanguageModel] = UsedValues()
_generators: UsedValues[LoRAGenerator] = UsedValues()
_last: list[LoRAGenerator] = []


def shared_language_model(name: str, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
    """`load_language_model`, loaded once for each (name, device, dtype) that is in use.

    Raises:
        ModelLoadError: the model can't be found, fetched, checked or converted.
    """
    return _language_models.get((name, device, dtype), lambda: load_language_model(name, device=device, dtype=dtype))[0]


def shared_generator(name: str, *, cloud: LanguageModel, edge: LanguageModel) -> LoRAGenerator:
    """`LoRAGenerator.load`, loaded once for each ("default" or folder, cloud LM, edge LM) that is in use.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or was trained for other language models.
    """

    def load() -> LoRAGenerator:
        # Tensors made in inference mode could not be trained or merged later.
        with torch.inference_mode(False):
            return LoRAGenerator.load(name, cloud=cloud, edge=edge)

    # A generator refers to both models, so their ids are not given to others while it is kept.
    generator, _ = _generators.get((name, id(cloud), id(edge)), load)
    _last[:] = [generator]
    return generator


def forget_last_generator() -> None:
    """Drop the generator that was asked for last, if nobody else uses it."""
    _last.clear()
