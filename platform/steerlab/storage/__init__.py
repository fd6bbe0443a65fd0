"""Artifacts on disk, each addressed by a hash of its inputs and parameters; the plan that makes them; tensor files."""
