"""What stands beside training: exports, evaluation, generation, verification."""
