"""Running a causal LM on OpenVINO: its graph, the compiled model, states, and the forward pass."""
