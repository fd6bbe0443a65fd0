"""From observations to numbers with an error."""
