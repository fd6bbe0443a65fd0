"""Turn observations into numbers with an error."""
