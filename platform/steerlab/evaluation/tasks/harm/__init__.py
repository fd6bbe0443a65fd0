"""Tasks on harmful outputs, and on the refusal of harmful and harmless requests."""
