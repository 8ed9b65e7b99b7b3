"""What every process of a run needs: its rank, launch variables, requests, watchdog, lock, errors, whole files."""
