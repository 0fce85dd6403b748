"""The chat model's fields: what each means, which values it takes, in which forms LangChain's users give them, and how
they are written down for traces, logs and files.

Knows nothing of running the model.
"""

from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.model_profile import ModelProfile
from pydantic import Field, InstanceOf, ValidationInfo, field_validator, model_validator

from loragen_agents.chat.profile import model_profile, name_of
from loragen_agents.chat.settings import SETTINGS, openai_dicts, read_registry, read_tool_choice
from loragen_agents.edge.grammar_source import grammar_source
from loragen_agents.generator import LoRAGenerator
from loragen_agents.models.language_models import DEFAULT_MODEL, LanguageModel
from loragen_agents.registry import InputFormat, ToolRegistry

# LangChain's standard parameters for models behind a network; a local model has no use for them.
_NETWORK_PARAMETERS = frozenset({"api_key", "base_url", "max_retries", "timeout"})


class ChatModelFields(BaseChatModel):
    """The fields of `LoRAGenChatModel`, checked when a model is made. What it says of itself follows from them."""

    model: str | InstanceOf[LanguageModel] = DEFAULT_MODEL
    """The edge LM: what `load_language_model` takes (a known name, Hub id, folder, GGUF file), or a loaded one."""

    cloud: str | InstanceOf[LanguageModel] | None = None
    """The LM that reads the definitions; by default the edge LM itself. Or the address of a service (`loragen-agents
    serve`) that specialises in its place, such as "http://cloud.example:8080"; the generator is then the service's."""

    generator: str | InstanceOf[LoRAGenerator] = "default"
    """The generator: "default" (ships with the package), a checkpoint folder, or a loaded one."""

    tools: Any = Field(default_factory=list)
    """Tools to specialise on, in any form that `ToolRegistry.from_tools` takes, or a `ToolRegistry`; kept as OpenAI
    dicts. Tools of `bind_tools` take their place."""

    input_format: InputFormat = "json"
    """How an Action Input is written: "json", or "csv" as in GPT4Tools. A `ToolRegistry` as `tools` brings its own."""

    tool_choice: str = "auto"
    """"auto", "any", "none" or a tool's name."""

    grammar: bool = True
    """Hold decoding to the registry's grammar: a tool's name, then its argument schema, or an answer."""

    score_tools: bool = True
    """Choose the tool by the probabilities of all of them, where decoding is greedy and held to the grammar; False lets
    the model spell a name."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 decodes greedily."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with at least this probability."""

    top_k: int = Field(default=0, ge=0)
    """Sample from so many tokens; 0 is all."""

    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """Seed of the sampling; the same seed gives the same text."""

    max_tokens: int = Field(default=256, ge=1)
    """Most tokens that one step may take."""

    stop: list[str] | None = None
    """Texts that end an answer; they are left out of it. Tool calls are not touched."""

    device: str = "auto"
    """Where models named above are put: "auto", "cpu", "cuda", ..."""

    dtype: str = "auto"
    """Their precision: "auto" (bfloat16 where the machine has it), "float32", ..."""

    specialization_cache: bool = True
    """Keep specialisations in memory and on disk. (`cache` is LangChain's cache of responses.)"""

    streaming: bool = False
    """Stream inside `invoke` too, for callbacks that want every token."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            unknown = sorted(values.keys() - cls.model_fields.keys() - _NETWORK_PARAMETERS)
            if unknown:
                raise ValueError(f"unknown parameters: {', '.join(unknown)}")
            registry = values.get("tools")
            if isinstance(registry, ToolRegistry):
                asked = values.setdefault("input_format", registry.input_format)
                if asked != registry.input_format:
                    raise ValueError(f"the registry's inputs are {registry.input_format}, not {asked}")
        return values

    @field_validator("tools", mode="before")
    @classmethod
    def _read_tools(cls, tools: Any) -> list[dict[str, Any]]:
        return openai_dicts(tools)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _read_choice(cls, choice: Any, info: ValidationInfo) -> str:
        # Tools can still be bound later; then the choice is checked against those.
        names = [tool["function"]["name"] for tool in info.data.get("tools", ())]
        return read_tool_choice(choice, names or None)

    @model_validator(mode="after")
    def _check_tools(self) -> "ChatModelFields":
        if self.grammar:
            grammar_source(read_registry(self.tools, self.input_format), "auto")
        return self

    # What LangChain asks a model about itself

    @property
    def _llm_type(self) -> str:
        return "loragen-agents"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("input_format", "stop", *SETTINGS)},
            "model": name_of(self.model),
            "cloud": name_of(self.cloud),
            "generator": name_of(self.generator),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "loragen_agents"
        params.setdefault("ls_model_name", name_of(self.model) or "")
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        return model_profile(self.model)

    # Serialisation: models that were handed over loaded are written down by their names.

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Models are written and read with `langchain_core.load`, where `load` is told to allow this class."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Names in the place of loaded models."""
        loaded = {name: getattr(self, name) for name in ("model", "cloud", "generator")}
        return {name: name_of(value) for name, value in loaded.items() if not isinstance(value, str | None)}

    def __repr_args__(self) -> Any:
        return [(name, self.lc_attributes.get(name, value)) for name, value in super().__repr_args__()]

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        state["__dict__"] = {**state["__dict__"], **self.lc_attributes}
        return state
