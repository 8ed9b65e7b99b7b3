"""How good a representation is: features, k-NN, linear probe, linear evaluation; and run folders, which they take."""
