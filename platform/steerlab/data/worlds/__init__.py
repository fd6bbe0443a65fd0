"""Synthetic data sets (a tiny language, small images) in which the effects of the methods show within seconds on a CPU."""
