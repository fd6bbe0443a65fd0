"""Causal language models: what differs between their architectures."""
