"""How good a representation is: features, k-NN, linear evaluation; and the run folders they come from."""
