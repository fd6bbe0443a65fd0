"""Diffusion pipelines: what differs between them."""
