"""Weights in and out of this package's models."""
from .authors import ConversionError, convert_state_dict
from .checkpoint import CheckpointError, Weights, check_weights, read_checkpoint, read_weights

__all__ = [
    'CheckpointError', 'ConversionError', 'Weights', 'check_weights', 'convert_state_dict', 'read_checkpoint',
    'read_weights']
