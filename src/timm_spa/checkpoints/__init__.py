"""Weight files: reading without running code, checks against a model, finding them on the Hub, atomic writing."""
