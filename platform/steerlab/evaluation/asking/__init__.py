"""Rows to prompts, prompts to answers: what tasks share before anything is judged."""
