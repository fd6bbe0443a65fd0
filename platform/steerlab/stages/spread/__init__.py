"""Work that is spread over workers: shards of data, and the model that each worker holds."""
