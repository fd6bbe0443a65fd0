"""One file a task: its config, its rows, and what it observes of the answers."""
