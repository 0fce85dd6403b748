"""LangChain's face: the chat model, its messages, settings and structured output."""
