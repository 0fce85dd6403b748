"""Language models and generators, loaded once a process for all who ask for the same one."""

from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import LanguageModel, load_language_model
from loragen_agents.specialization.shared_values import SharedValues

_language_models: SharedValues[LanguageModel] = SharedValues()
_generators: SharedValues[LoRAGenerator] = SharedValues()


def shared_language_model(name: str, *, device: str = "auto", dtype: str = "auto") -> LanguageModel:
    """`load_language_model`, once a process for each (name, device, dtype).

    Raises:
        ModelLoadError: the model can't be found, fetched, checked or converted.
    """
    return _language_models.get((name, device, dtype), lambda: load_language_model(name, device=device, dtype=dtype))[0]


def shared_generator(name: str, *, cloud: LanguageModel, edge: LanguageModel) -> LoRAGenerator:
    """`LoRAGenerator.load`, once a process for each ("default" or folder, cloud LM, edge LM).

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or was trained for other language models.
    """
    key = (name, id(cloud), id(edge))
    return _generators.get(key, lambda: LoRAGenerator.load(name, cloud=cloud, edge=edge))[0]
