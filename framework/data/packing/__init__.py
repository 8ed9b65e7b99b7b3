"""From images as they lie around to shards."""
