"""The cloud side: from a system prompt to LoRA weights of the edge LM."""

from loragen_agents.generator.lora_generator import Generated, GeneratorConfig, LoRAGenerator

__all__ = ["Generated", "GeneratorConfig", "LoRAGenerator"]
