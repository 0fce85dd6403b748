"""The trainer: recipes, the episode model and its batches."""
