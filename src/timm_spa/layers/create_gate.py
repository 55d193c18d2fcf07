"""Gates by name: the one place that knows which layer the prefix of a model name stands for."""
from typing import Any, Dict, Optional, Sequence

import torch.nn as nn
from timm.layers import GlobalContext, SEModule
from timm.layers.cbam import CbamModule

from .comparison_gates import GatherExcite, GatherExciteConv, NoGate, SelfGate, SqueezeExcite
from .spatial_pyramid_attention import SpatialPyramidAttention

__all__ = ['GATES', 'create_gate']

# what each name stands for
GATES: Dict[str, str] = {
    'spa': 'SPA-A',
    'spa_b': 'SPA-B',
    'spa_c': 'SPA-C',
    'se': 'squeeze-and-excitation without biases (the CIFAR models of the paper)',
    'se_b': "SE+: squeeze-and-excitation of the block's input",
    'se_c': "SE++: squeeze-and-excitation of the block's input, channels matched",
    'se_bias': 'squeeze-and-excitation with biases (the ImageNet models of the paper)',
    'ge': 'gather-excite, global extent, no parameters',
    'ge_conv': 'gather-excite, extent 8, depthwise convolutions',
    'cbam': 'convolutional block attention module',
    'gc': 'global context',
    'none': 'no gate: the plain net',
}


def create_gate(
        gate: str,
        channels: int,
        in_channels: int,
        pyramid_sizes: Sequence[int] = (1, 4, 7),
        rd_ratio: float = 1. / 16,
        reduce_source: bool = False,
        norm_layer: Any = nn.BatchNorm2d,
        device: Optional[Any] = None,
        dtype: Optional[Any] = None,
) -> nn.Module:
    """Creates the gate of one block.

    Args:
        gate: Name of the gate, a key of `GATES`.
        channels: Channels of the map to gate.
        in_channels: Channels of the block's input.
        pyramid_sizes: Side lengths of SPA's pooled maps, in cells.
        rd_ratio: Reduced width over `channels`, rounded down, at least 1.
        reduce_source: Take the ratio of the channels that are read, not of those that are gated: in the reduced width
            of variant b and in the channel matcher of c. The authors do so in DenseNet.
        norm_layer: Norm layer of the gate, if it has any.

    Returns:
        A module that takes the map to gate and the block's input, and returns the gated map.

    Raises:
        ValueError: The gate is unknown.
    """
    dd: Any = {'device': device, 'dtype': dtype}
    variant = gate[-1] if gate.endswith(('_b', '_c')) else 'a'
    source_channels = channels if variant == 'a' else in_channels
    rd_channels = max(1, int(channels * rd_ratio))
    source_rd_channels = max(1, int(source_channels * rd_ratio)) if reduce_source else rd_channels
    rd_args: Any = dict(
        rd_channels=source_rd_channels if variant == 'b' else rd_channels, matcher_rd_channels=source_rd_channels)
    if gate in ('spa', 'spa_b', 'spa_c'):
        return SpatialPyramidAttention(
            channels, source_channels, variant, pyramid_sizes, **rd_args, norm_layer=norm_layer, inplace=True, **dd)
    if gate in ('se', 'se_b', 'se_c'):
        return SqueezeExcite(channels, source_channels, variant, **rd_args, norm_layer=norm_layer, **dd)
    if gate == 'se_bias':
        return SelfGate(SEModule(channels, rd_channels=rd_channels, **dd))
    if gate == 'ge':
        return GatherExcite()
    if gate == 'ge_conv':
        return GatherExciteConv(channels, norm_layer=norm_layer, **dd)
    if gate == 'cbam':
        return SelfGate(CbamModule(channels, rd_channels=rd_channels, mlp_bias=True, **dd))
    if gate == 'gc':
        return SelfGate(GlobalContext(channels, rd_channels=rd_channels, **dd))
    if gate == 'none':
        return NoGate()
    raise ValueError(f'gate must be one of {", ".join(map(repr, GATES))}, got {gate!r}.')
