"""Rows of data sets: reading them from their sources, recognising the forms they come in, and filtering and renaming them."""
