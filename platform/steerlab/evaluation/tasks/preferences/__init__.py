"""Tasks that compare answers by human or model preferences."""
