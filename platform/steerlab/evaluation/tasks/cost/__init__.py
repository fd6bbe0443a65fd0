"""Tasks on what a patch costs in time and memory."""
