"""What a plan costs, counted without running it."""
