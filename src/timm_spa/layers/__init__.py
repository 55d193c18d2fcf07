"""The attention layers. They know nothing of models."""
from .comparison_gates import GatherExcite, GatherExciteConv, NoGate, SelfGate, SqueezeExcite
from .fused_branch import FusedBranch, fuse_branch
from .spatial_pyramid_attn import SpatialPyramidAttention

__all__ = [
    'FusedBranch', 'GatherExcite', 'GatherExciteConv', 'NoGate', 'SelfGate', 'SpatialPyramidAttention',
    'SqueezeExcite', 'fuse_branch']
