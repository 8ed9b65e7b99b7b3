"""Images on their way to the network: shards and their index, views (augmentation), loaders."""
