"""The attention layers. They know nothing of models."""
from .comparison_gates import GatherExcite, GatherExciteConv, NoGate, SelfGate, SqueezeExcite
from .fused_branch import FusedBranch, fuse_branch
from .own_gate import OwnGate, create_own_gate
from .spatial_pyramid_attn import SpatialPyramidAttention

__all__ = [
    'FusedBranch', 'GatherExcite', 'GatherExciteConv', 'NoGate', 'OwnGate', 'SelfGate', 'SpatialPyramidAttention',
    'SqueezeExcite', 'create_own_gate', 'fuse_branch']
