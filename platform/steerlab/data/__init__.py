"""Rows: where they come from, the forms in which data sets hold them, and what a job makes of them."""
