"""Text and batches: corpora, tokenizers, shards, streams."""
