"""The method-blind training loop, DeepSpeed under it and Ray Train around it."""
