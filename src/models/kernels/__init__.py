"""Operations that plain autograd makes slow on a CPU, each with a backward pass of its own."""
