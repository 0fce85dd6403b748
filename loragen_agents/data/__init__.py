"""Training data: records, readers, augmentation, the sampler, the project's own tools, GPT4Tools' files and -mini."""
