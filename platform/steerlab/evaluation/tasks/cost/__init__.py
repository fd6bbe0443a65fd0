"""Tasks on the cost of a patch in time and memory."""
