"""Number formats and precision recipes for pretraining. Knows nothing of trainers; works on any tree of ``nn.Linear``."""
