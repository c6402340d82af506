"""From one prompt to a dataset: examples, shards, statistics."""
