"""Text in, steps out: prompts, chat templates, and the Thought / Action / Action Input format."""
