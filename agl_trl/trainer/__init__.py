"""The callback that protects any Trainer, and the TRL trainers built on it."""
