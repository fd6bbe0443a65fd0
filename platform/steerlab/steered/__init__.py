"""A loaded model with its patches: generate, draw, score, read, export."""
