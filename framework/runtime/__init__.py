"""What every process of a run needs: its rank, launch variables, requests from outside, watchdog, errors, whole files."""
