"""The attention layers. They know nothing of models."""
from .comparison_gates import GatherExcite, GatherExciteConv, NoGate, SelfGate, SqueezeExcite
from .fused_branch import FusedBranch, fuse_branch
from .gates import GATES, create_gate
from .spatial_pyramid_attn import SpatialPyramidAttention

__all__ = [
    'GATES', 'FusedBranch', 'GatherExcite', 'GatherExciteConv', 'NoGate', 'SelfGate', 'SpatialPyramidAttention',
    'SqueezeExcite', 'create_gate', 'fuse_branch']
