"""Parameters, FLOPs and activations of a plan, counted without computing."""
