"""Shards in WebDataset format, local or remote, and the index of what lies where."""
