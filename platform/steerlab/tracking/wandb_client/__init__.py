"""Weights & Biases beyond a run's own page: sweeps, agents, workspaces."""
