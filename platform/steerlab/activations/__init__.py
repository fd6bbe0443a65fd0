"""Activations of a model on texts: reading them, storing them in Parquet, or storing their moments only."""
