"""Weights in and out of this package's models."""
from .convert import ConversionError, convert_state_dict, read_checkpoint

__all__ = ['ConversionError', 'convert_state_dict', 'read_checkpoint']
