"""The specialised model over HTTP, in OpenAI's shape."""
