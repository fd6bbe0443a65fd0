"""One file for each task: its config, its rows, and how it judges the answers."""
