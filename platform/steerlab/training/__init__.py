"""The training loop, which does not depend on the method; it runs on DeepSpeed inside Ray Train."""
