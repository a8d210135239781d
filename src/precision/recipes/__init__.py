"""One paper, one file: ``recipe(**args) -> Recipe``. The directory is the registry."""
