"""Gets the model ready while the user types the first request.

Everything slow (PyTorch, the weights, the specialisation) happens in one thread. A model that is not on this machine
yet is fetched before, in the foreground, where its progress can be seen.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.tools import BaseTool

MAX_TOKENS = 200


@dataclass(frozen=True)
class ModelChoice:
    """Which models and generator to load; None: the default edge LM, and the edge LM itself as the cloud LM.

    Attributes:
        dtype: of both LMs, as `load_language_model` takes it.
    """

    edge: str | None = None
    cloud: str | None = None
    generator: str = "default"
    device: str = "auto"
    dtype: str = "auto"


def load_chat_model(choice: ModelChoice) -> BaseChatModel:
    """The chat model of a choice.

    Raises:
        ModelLoadError: a model can't be had.
        CheckpointError: the generator does not fit or is damaged.
    """
    from loragen_agents.chat.chat_models import LoRAGenChatModel
    from loragen_agents.chat.loading import load_parts
    from loragen_agents.support.progress import silent

    places: dict[str, Any] = {"device": choice.device, "dtype": choice.dtype, "progress": silent}
    return LoRAGenChatModel(**load_parts(choice.edge, choice.cloud, choice.generator, **places), max_tokens=MAX_TOKENS)


def fetch_models(choice: ModelChoice) -> None:
    """Fetch and convert what is not on this machine yet, with progress on the terminal."""
    from loragen_agents.models.cache import find_stored, obtain_model
    from loragen_agents.models.sources import DEFAULT_MODEL
    from loragen_agents.specialization.cloud import is_service

    edge = choice.edge or DEFAULT_MODEL
    for name in {edge, edge if is_service(choice.cloud) else choice.cloud or edge}:
        if find_stored(name) is None:
            obtain_model(name)


def warm_up(model: BaseChatModel, tools: Sequence[BaseTool], system: str) -> None:
    """Specialise the model on the tools, and let it decode a token, so that the first turn is like any other."""
    messages: list[BaseMessage] = [*([SystemMessage(system)] if system else []), HumanMessage("Hello")]
    model.bind_tools(tools).invoke(messages, max_tokens=1)


class Loading:
    """A model that is being made in a thread of its own."""

    def __init__(self, make: Callable[[], BaseChatModel]) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[BaseChatModel] = self._loop.create_future()
        # A daemon: leaving while it loads must not wait for it.
        threading.Thread(target=self._work, args=(make,), name="model", daemon=True).start()

    @property
    def done(self) -> bool:
        return self._future.done()

    async def model(self) -> BaseChatModel:
        """The model, as soon as it is there; raises what making it raised."""
        return await asyncio.shield(self._future)

    def _work(self, make: Callable[[], BaseChatModel]) -> None:
        value: Any = None
        failure: BaseException | None = None
        try:
            value = make()
        except Exception as error:
            failure = error
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle, value, failure)

    def _settle(self, value: Any, failure: BaseException | None) -> None:
        if failure is None:
            self._future.set_result(value)
        else:
            self._future.set_exception(failure)
            self._future.exception()  # looked at: nobody may ask for the model before the program ends
