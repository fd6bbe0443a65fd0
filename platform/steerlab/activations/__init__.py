"""What a model computes inside, read from texts: on disk, or as moments alone."""
