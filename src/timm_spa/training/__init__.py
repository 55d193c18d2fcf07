"""Training with timm's scripts: running them with our models registered, guarding a run, reading its files."""
