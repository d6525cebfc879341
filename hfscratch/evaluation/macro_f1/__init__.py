"""The `evaluate` module of the same name."""
