"""What every process of a run needs: its rank, launch variables, requests, watchdog, errors, whole files."""
