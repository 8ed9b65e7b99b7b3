"""The training loop, where it goes on, and what it leaves."""
