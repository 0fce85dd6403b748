"""The models and the generator of a chat model, loaded: the one place that says what goes together.

For those who want them loaded before the first call. `LoRAGenChatModel` itself takes names and loads at that call.
"""

from typing import Any

from loragen_agents.errors import ModelLoadError
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import DEFAULT_MODEL, load_cloud_model, load_language_model
from loragen_agents.specialization.cloud import is_service
from loragen_agents.support.progress import Progress


def load_parts(
    edge: str | None = None,
    cloud: str | None = None,
    generator: str = "default",
    *,
    device: str = "auto",
    dtype: str = "auto",
    service: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `LoRAGenChatModel` takes as `model`, `cloud` and `generator`.

    Args:
        edge: the edge LM, as `load_language_model` takes it; None for the default model.
        cloud: the cloud LM; None for the edge LM itself. Or the address of a service, which has the generator: then
            none is loaded here.
        generator: "default" or a checkpoint folder.
        device, dtype: of both language models.
        service: whether a service will do; False where the generator itself is needed.
        progress: as `load_language_model` takes it.

    Raises:
        ModelLoadError: a model can't be had, or a service is given where none will do.
        CheckpointError: the generator is damaged, or was made for other models.
    """
    if is_service(cloud) and not service:
        raise ModelLoadError(f"{cloud} is the address of a service; expected a language model that runs here")
    model = load_language_model(edge or DEFAULT_MODEL, device=device, dtype=dtype, progress=progress)
    if is_service(cloud):
        return {"model": model, "cloud": cloud}
    reader = load_cloud_model(cloud, model, device=device, dtype=dtype, progress=progress)
    return {"model": model, "cloud": reader, "generator": LoRAGenerator.load(generator, cloud=reader, edge=model)}
