"""Runs timm's scripts with our models registered, checks training runs, and reads their files."""
