"""Checkpoints: what is in one, how it reaches the disk, and which of them stay."""
