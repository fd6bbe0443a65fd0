"""Turn rows into inputs of a model: tokens with roles for language models, prompts with seeds for diffusion models."""
