"""How optimizer states and weights are kept and updated."""
