"""What a model says of itself to LangChain: its name and what it can do."""

from typing import Any

from langchain_core.language_models.model_profile import ModelProfile

from loragen_agents.models.language_models import LanguageModel

_UNABLE = ("image_inputs", "image_url_inputs", "pdf_inputs", "audio_inputs", "video_inputs")


def name_of(given: Any) -> str | None:
    """How a model or generator is written down: as it was asked for."""
    if given is None or isinstance(given, str):
        return given
    return given.name if isinstance(given, LanguageModel) else f"generator {given.fingerprint[:12]}"


def model_profile(model: str | LanguageModel) -> ModelProfile:
    """LangChain's profile of a chat model on this edge LM; its room for tokens only where the LM is loaded."""
    profile = ModelProfile(
        name=name_of(model) or "",
        open_weights=True,
        text_inputs=True,
        text_outputs=True,
        tool_calling=True,
        tool_choice=True,
        # create_agent would send `response_format` to a model that claims this; it forces a tool call otherwise.
        structured_output=False,
    )
    if isinstance(model, LanguageModel):
        limit = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            profile["max_input_tokens"] = limit
    for name in _UNABLE:
        profile[name] = False  # type: ignore[literal-required]
    return profile
