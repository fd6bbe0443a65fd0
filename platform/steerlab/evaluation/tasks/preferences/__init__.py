"""Tasks that compare answers by preferences of humans or models."""
