"""Weights in and out of this package's models."""
from ..checkpoints.reading import CheckpointError, Weights, check_weights, read_checkpoint, read_weights
from .authors import ConversionError, convert_state_dict

__all__ = [
    'CheckpointError', 'ConversionError', 'Weights', 'check_weights', 'convert_state_dict', 'read_checkpoint',
    'read_weights']
