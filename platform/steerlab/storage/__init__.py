"""What stays on disk: artifacts addressed by what made them, the plan that makes them, tensors."""
