"""Hub repositories: model card, configuration, publishing and verification; and weight files for them."""
from ..checkpoints.reading import CheckpointError, Weights, check_weights, read_checkpoint, read_weights

__all__ = [
    'CheckpointError', 'Weights', 'check_weights', 'read_checkpoint', 'read_weights']
