"""Artifacts on disk, each addressed by a hash of what made it; the plan that makes them; tensor files."""
