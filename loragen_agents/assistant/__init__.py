"""The assistant in the terminal: its tools, its loop, its screen. What a model decides is the chat model's part."""
