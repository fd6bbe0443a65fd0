"""From rows to what a model reads: tokens with roles, prompts with seeds."""
