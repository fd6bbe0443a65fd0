"""Tasks on whether the model distinguishes instructions from data."""
