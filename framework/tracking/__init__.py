"""What a run measures and shows: the log, trackers, progress, the status of runs."""
