"""Language models: where they come from, how they are kept, and loaded."""
