"""Causal language models: the differences between their architectures."""
