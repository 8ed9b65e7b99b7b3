"""What a rank of the pipeline runs, sends and receives."""
