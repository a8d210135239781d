"""How optimizer states and weights are stored and updated."""
