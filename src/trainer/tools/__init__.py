"""What is done outside of training: exports, evaluation, generation, verification."""
