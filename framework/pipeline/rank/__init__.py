"""How one rank carries out the schedule of its stage: what it runs, sends and receives."""
