"""What the generator hands to the edge: LoRA weights and the keys that requests are compared with."""
