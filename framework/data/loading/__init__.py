"""From shards to batches: the order of samples, worker processes, images kept in memory."""
