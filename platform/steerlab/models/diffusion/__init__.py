"""Loading diffusion pipelines and drawing with them."""
