"""Tasks on the tiny world, judged by its own grammar."""
