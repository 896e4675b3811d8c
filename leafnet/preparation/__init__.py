"""From photographs to a data set in shards."""
