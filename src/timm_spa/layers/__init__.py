"""The attention layers. They know nothing of models."""
from .create_gate import create_gate
from .spatial_pyramid_attention import ChannelMatcher, SpatialPyramidAttention

__all__ = ['ChannelMatcher', 'SpatialPyramidAttention', 'create_gate']
