"""Rows of data sets: reading them from their sources, recognising their forms, and filtering and renaming them."""
