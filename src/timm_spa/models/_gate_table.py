"""The table of the gates that models have, from which prefixes of their names, labels and choices are derived."""
import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch.nn as nn
from timm.layers import GroupNorm1, LayerType, create_attn, get_norm_layer

from ..layers import (
    GatherExcite,
    GatherExciteConv,
    NoGate,
    SelfGate,
    SpatialPyramidAttention,
    SqueezeExcite,
    create_own_gate,
)

__all__ = ['GATES', 'Gate', 'GateLike', 'create_gate', 'reads_block_input']

GateLike = Union[str, Callable[[int], nn.Module]]  # a name of the table, or a function of the number of channels


class Gate(NamedTuple):
    """A gate and its properties.

    Attributes:
        label: Name in tables and plots.
        description: Description for documentation.
        create: Makes the layer from `channels`, `rd_channels`, `norm_layer` and further keywords of `create_gate`.
        variant: Input of the gate: 'a' the gated feature map, 'b' the block's input, 'c' the block's input with its
            channels matched.
        zeros: Parameters of the layer. If they are zero, the gate has one value everywhere.
        doublings: Number of times that this value has to be doubled to be 1; None if the gate cannot be neutral.
        min_width: Smallest reduced width.
        min_added_width: The same in `add_attention`, if it is larger than the paper's.
        is_prefix: Whether names of models start with the name of the gate and an underscore.
    """
    label: str
    description: str
    create: Callable[..., nn.Module]
    variant: str = 'a'
    zeros: Tuple[str, ...] = ('fc2.weight',)
    doublings: Optional[int] = 1
    min_width: int = 1
    min_added_width: int = 1
    is_prefix: bool = False


def _no_attention(**kwargs: Any) -> nn.Module:
    return NoGate()


def _spa(channels: int, **kwargs: Any) -> nn.Module:
    return SpatialPyramidAttention(channels, **kwargs)


def _se(channels: int, pyramid_sizes: Sequence[int], **kwargs: Any) -> nn.Module:
    return SqueezeExcite(channels, **kwargs)


def _ge(**kwargs: Any) -> nn.Module:
    return GatherExcite()


def _ge_conv(channels: int, norm_layer: LayerType, device=None, dtype=None, **kwargs: Any) -> nn.Module:
    return GatherExciteConv(channels, norm_layer, device=device, dtype=dtype)


def _timm(name: str, *passed: str, **fixed: Any) -> Callable[..., nn.Module]:
    """Returns a function that makes one of timm's attention layers.

    Args:
        name: Name of the layer for timm's `create_attn`.
        *passed: Keywords of `create_gate` that the layer takes.
        **fixed: Further arguments of the layer.
    """
    def create(channels: int, device=None, dtype=None, **kwargs: Any) -> nn.Module:
        arguments = {key: kwargs[key] for key in passed}
        return SelfGate(create_attn(name, channels, device=device, dtype=dtype, **arguments, **fixed))

    return create


# Without a norm layer, a hidden channel may be negative before the ReLU for all images, and never get a gradient.
# This happens to a single channel often, and to all of eight rarely.
MIN_HIDDEN = 8

GATES: Dict[str, Gate] = {
    'none': Gate('none', 'no attention', _no_attention, zeros=(), doublings=0),
    'se': Gate('SE', 'squeeze-and-excitation', _se, min_added_width=MIN_HIDDEN, is_prefix=True),
    'se_b': Gate('SE+', "SE+, squeeze-and-excitation of the block's input", _se, variant='b', is_prefix=True),
    'se_c': Gate(
        'SE++', "SE++, squeeze-and-excitation of the block's input, channels matched", _se, variant='c',
        is_prefix=True),
    'ge': Gate('GE', 'parameter-free gather-excite of global extent', _ge, zeros=(), doublings=None, is_prefix=True),
    'cbam': Gate(
        'CBAM', 'the convolutional block attention module', _timm('cbam', 'rd_channels', mlp_bias=True),
        zeros=('layer.channel.fc2.weight', 'layer.channel.fc2.bias', 'layer.spatial.conv.bn.weight',
               'layer.spatial.conv.bn.bias'),
        doublings=2, min_added_width=MIN_HIDDEN, is_prefix=True),
    'gc': Gate(  # its layer norm over the reduced width makes one value a constant, and two values plus and minus one
        'GC', 'global context', _timm('gc', 'rd_channels'),
        zeros=('layer.mlp_scale.fc2.weight', 'layer.mlp_scale.fc2.bias'), min_width=4, is_prefix=True),
    'spa': Gate('SPA-A', 'SPA-A (the gate reads the feature map that it rescales)', _spa, is_prefix=True),
    'spa_b': Gate('SPA-B', "SPA-B (the gate reads the block's input)", _spa, variant='b', is_prefix=True),
    'spa_c': Gate(
        'SPA-C', "SPA-C (the gate reads the block's input, channels matched)", _spa, variant='c', is_prefix=True),
    # the comparison of table III at ImageNet's image size
    'se_bias': Gate(
        'SE', 'squeeze-and-excitation with biases', _timm('se', 'rd_channels'),
        zeros=('layer.fc2.weight', 'layer.fc2.bias'), min_added_width=MIN_HIDDEN),
    'ge_conv': Gate(
        'GE', 'gather-excite by depthwise convolutions', _ge_conv, zeros=('gather.7.weight', 'gather.7.bias')),
    # further layers of timm's `create_attn`, by its names and with its defaults, but for the reduced widths
    'ese': Gate(
        'eSE', 'effective squeeze-and-excitation', _timm('ese'), zeros=('layer.fc.weight', 'layer.fc.bias')),
    'eca': Gate('ECA', 'efficient channel attention', _timm('eca'), zeros=('layer.conv.weight',)),
    'ecam': Gate(
        'ECA-MLP', 'efficient channel attention with two convolutions', _timm('ecam', 'rd_channels'),
        zeros=('layer.conv2.weight', 'layer.conv2.bias'), min_width=MIN_HIDDEN),
    'ceca': Gate('cECA', 'circular efficient channel attention', _timm('ceca'), zeros=('layer.conv.weight',)),
    'gca': Gate(  # adds the context; min_width as for global context
        'GC-add', 'global context that is added', _timm('gca', 'rd_channels'),
        zeros=('layer.mlp_add.fc2.weight', 'layer.mlp_add.fc2.bias'), doublings=0, min_width=4),
    'lcbam': Gate(
        'light CBAM', 'the light convolutional block attention module', _timm('lcbam', 'rd_channels'),
        zeros=('layer.channel.fc2.weight', 'layer.spatial.conv.bn.weight', 'layer.spatial.conv.bn.bias'),
        doublings=2, min_width=MIN_HIDDEN),
    'coord': Gate(
        'CA', 'coordinate attention', _timm('coord', 'rd_channels', 'norm_layer'),
        zeros=('layer.conv_h.weight', 'layer.conv_w.weight'), doublings=2, min_width=MIN_HIDDEN),
    'scoord': Gate(
        'simple CA', 'simple coordinate attention', _timm('scoord', 'rd_channels'),
        zeros=('layer.fc_h.weight', 'layer.fc_h.bias', 'layer.fc_w.weight', 'layer.fc_w.bias'), min_width=MIN_HIDDEN),
    'ela': Gate(
        'ELA', 'efficient local attention', _timm('ela'),
        zeros=('layer.norm_h.weight', 'layer.norm_h.bias', 'layer.norm_w.weight', 'layer.norm_w.bias'), doublings=2),
    'strip': Gate(
        'strip', 'strip attention', _timm('strip'), zeros=('layer.conv_h.weight', 'layer.conv_w.weight')),
}


def create_gate(
        gate: GateLike,
        channels: int,
        in_channels: int,
        pyramid_sizes: Sequence[int] = (1, 4, 7),
        rd_ratio: float = 1. / 16,
        reduce_source: bool = False,
        norm_layer: LayerType = nn.BatchNorm2d,
        min_width: int = 1,
        device=None,
        dtype=None,
) -> nn.Module:
    """Creates the gate of one block.

    Args:
        gate: Name of the gate, a key of `GATES`; or a class or function that makes any layer that maps (N, C, H, W)
            to the same shape from `channels`, see `OwnGate`. The arguments from `in_channels` on are not for these.
        channels: Channels of the map to gate.
        in_channels: Channels of the block's input.
        pyramid_sizes: Side lengths of SPA's averages, in cells.
        rd_ratio: Reduced width over `channels`, rounded down, at least `min_width` of the gate.
        reduce_source: Take the ratio of the channels that are read instead, for the reduced width of variant b and
            that of the channel matcher of c, as the authors' DenseNet does.
        norm_layer: Norm layer of the gate, if it has any. A group norm becomes one of a single group: the reduced
            widths are seldom whole multiples of timm's 32.
        min_width: Smallest reduced width, if it is larger than that of the gate.

    Returns:
        A module that takes the map to gate and the block's input, and returns the gated map. Its `gate_name` is `gate`,
        or 'own'.

    Raises:
        ValueError: The gate is unknown, the ratio is not a positive number, or the gate would be constant.
        UsageError: The gate is a class or function that makes no layer of this kind.
    """
    if not isinstance(gate, str):
        return create_own_gate(gate, channels, device, dtype)
    if gate not in GATES:
        raise ValueError(f'gate must be one of {", ".join(map(repr, GATES))}, got {gate!r}.')
    if not isinstance(rd_ratio, (int, float)) or not 0 < rd_ratio < math.inf:
        raise ValueError(f'rd_ratio must be a positive number, got {rd_ratio!r}.')
    norm_layer = get_norm_layer(norm_layer)
    if isinstance(norm_layer, type) and issubclass(norm_layer, nn.GroupNorm):
        norm_layer = GroupNorm1
    variant = GATES[gate].variant
    in_channels = channels if variant == 'a' else in_channels
    rd_channels = max(min_width, GATES[gate].min_width, int(channels * rd_ratio))
    source_rd_channels = max(1, int(in_channels * rd_ratio)) if reduce_source else rd_channels
    layer: Any = GATES[gate].create(
        channels=channels,
        in_channels=in_channels,
        variant=variant,
        pyramid_sizes=pyramid_sizes,
        rd_channels=source_rd_channels if variant == 'b' else rd_channels,
        matcher_rd_channels=source_rd_channels,
        norm_layer=norm_layer,
        device=device,
        dtype=dtype,
    )
    _check_not_constant(gate, layer, channels, rd_ratio)
    layer.gate_name = gate
    return layer


def reads_block_input(gate: str) -> bool:
    """Returns whether a gate of the table reads the input of the block, as the paper's variants B and C do."""
    return GATES[gate].variant != 'a'


def _check_not_constant(gate: str, layer: Any, channels: int, rd_ratio: float) -> None:
    """Raises a ValueError if a norm layer of a gate leaves the same values for every image."""
    cells = layer.pyramid_sizes[0] ** 2 if isinstance(layer, SpatialPyramidAttention) else math.inf
    for name, norm in layer.named_modules():
        # the gate averages over the whole map behind the last layer of the channel matcher, or sees its own pyramid
        averaged = name == 'matcher.bn2' and (cells == 1 or isinstance(layer, SqueezeExcite))
        if hasattr(norm, 'normalized_shape'):  # layer norm, RMS norm
            count: float = math.prod(norm.normalized_shape)
        elif isinstance(norm, nn.GroupNorm):
            count = norm.num_channels // norm.num_groups * (cells if name == 'bn' else 1 if averaged else math.inf)
        elif isinstance(norm, nn.modules.instancenorm._InstanceNorm):
            count = cells if name == 'bn' else 1 if averaged else math.inf
        else:
            continue
        if count == 1:
            raise ValueError(
                f'The gate {gate!r} of {channels} channels cannot learn: its norm layer {name}, a '
                f'{type(norm).__name__}, subtracts the mean of a single value and leaves a constant. Use a larger '
                f'rd_ratio than {rd_ratio:g}, larger pyramid_sizes, or batch norm as norm_layer.')
