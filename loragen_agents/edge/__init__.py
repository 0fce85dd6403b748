"""The edge side: decoding, forward passes, grammar and tool choice of a specialised model."""
