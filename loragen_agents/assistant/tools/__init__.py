"""The assistant's tools: functions with plain arguments that give a `Result` or raise `ToolError`.

One module for a group of tools; each has `tools(context)`, which gives its functions by tool name. What the model reads
about them stands in `tools/assistant.yaml`.
"""
