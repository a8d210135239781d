"""Number formats and precision recipes for pretraining: for any tree of ``nn.Linear``, under any trainer."""
