"""Made-up worlds, in which the effects of the methods show within seconds on a CPU: words and small images."""
