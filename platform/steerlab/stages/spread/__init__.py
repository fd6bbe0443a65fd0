"""Distribute the work of a stage over workers: shards of data, and a loaded model in each worker."""
