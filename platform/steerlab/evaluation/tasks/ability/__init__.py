"""Tasks on the model's abilities: perplexity, arithmetic, instructions, and lm-evaluation-harness."""
