"""A loaded model with its patches: generate text, draw images, score texts, read hidden states, export."""
