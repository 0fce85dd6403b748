"""LangChain's standard integration tests, on the embedded model with the generator that ships."""

from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from loragen_agents import LoRAGenChatModel
from loragen_agents.specialization.shared_models import shared_language_model


class TestLoRAGenChatModelIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[LoRAGenChatModel]:
        return LoRAGenChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"max_tokens": 128}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        """The same weights by another name, which the shipped generator takes: their folder."""
        return str(shared_language_model("smollm2-135m-instruct").folder)

    @property
    def supported_usage_metadata_details(self) -> dict[Literal["invoke", "stream"], list[Any]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = LoRAGenChatModel(**self.chat_model_params)
        # In bf16, beginnings are used again by whole passes of 128 tokens.
        first = [HumanMessage("Name a river in France. " + "Think of the big ones first. " * 25)]
        answer = model.invoke(first, max_tokens=8)
        again = [*first, answer, HumanMessage("And one in Spain?")]
        if not stream:
            message = model.invoke(again, max_tokens=8)
        else:
            chunks = list(model.stream(again, max_tokens=8))
            message = sum(chunks[1:], start=chunks[0])  # type: ignore[assignment, call-overload]
        details = (message.usage_metadata or {}).get("input_token_details") or {}  # type: ignore[union-attr, call-overload]
        assert details["cache_read"] > 0
        return message
