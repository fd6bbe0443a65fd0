"""Tasks on prompt injection: whether the model executes an attacker's text in the data."""
