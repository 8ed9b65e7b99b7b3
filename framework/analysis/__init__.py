"""What to look at after training: every analysis of the papers, on one or several run folders."""
