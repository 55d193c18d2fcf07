"""The attention layers. They know nothing of models."""
from .comparison_gates import GatherExcite, GatherExciteConv, NoGate, SelfGate, SqueezeExcite
from .create_gate import GATES, create_gate
from .residual import gated_residual, saves_passes
from .spatial_pyramid_attention import ChannelMatcher, SpatialPyramidAttention

__all__ = [
    'GATES', 'ChannelMatcher', 'GatherExcite', 'GatherExciteConv', 'NoGate', 'SelfGate', 'SpatialPyramidAttention',
    'SqueezeExcite', 'create_gate', 'gated_residual', 'saves_passes']
