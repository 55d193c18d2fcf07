"""Spatial Pyramid Attention (SPA).

Paper: `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
"""
from collections import OrderedDict
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType, create_act_layer, get_norm_layer

from .pyramid_formulas import gate_formula, pyramid_formula
from .torchscript import is_scripting, is_tracing

__all__ = ['SpatialPyramidAttention', 'apply_gate', 'channel_matcher', 'weighted_pyramid']


@torch.fx.wrap
def weighted_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Averages `x` (N, C, H, W) to sizes, the largest first, resizes to it and sums with weights, equation (1)."""
    if not is_scripting():
        formula = pyramid_formula(x)
        if formula is not None:
            return formula(x, sizes, weight)
    pyramid = F.adaptive_avg_pool2d(x, sizes[0]) * weight[0]
    for i in range(1, len(sizes)):
        level = F.adaptive_avg_pool2d(x, sizes[i]) * weight[i]
        pyramid = pyramid + (level if sizes[i] == 1 else F.interpolate(level, size=sizes[0], mode='nearest'))
    return pyramid


@torch.fx.wrap
def apply_gate(x: torch.Tensor, gate: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Multiplies `x` (N, C, H, W) by a gate (N, C, P, Q) resized to it (nearest), and adds the shortcut, if any."""
    if not is_scripting():
        formula = gate_formula(x)
        if formula is not None:
            return formula(x, gate, shortcut)
    # on CUDA, autocast resizes in float32: all that follows would be float32 too
    x = x * F.interpolate(gate, size=x.shape[-2:], mode='nearest').to(gate.dtype)
    return x if shortcut is None else shortcut + x


@torch.fx.wrap
def _check_shape(name: str, x: torch.Tensor, channels: int) -> None:
    if not is_tracing() and (x.dim() != 4 or x.shape[1] != channels):
        raise ValueError(f'{name} must have the shape (N, {channels}, H, W), got {list(x.shape)}.')


def channel_matcher(in_channels: int, channels: int, rd_channels: int, act_layer: LayerType = nn.ReLU,
                    norm_layer: LayerType = nn.BatchNorm2d, device=None, dtype=None) -> nn.Sequential:
    """Returns psi of equation (5), which maps (N, in_channels, H, W) to (N, channels, H, W)."""
    dd, norm_layer = {'device': device, 'dtype': dtype}, get_norm_layer(norm_layer)
    return nn.Sequential(OrderedDict(
        fc1=nn.Conv2d(in_channels, rd_channels, kernel_size=1, bias=False, **dd),
        bn1=norm_layer(rd_channels, **dd),
        act=create_act_layer(act_layer, inplace=True),
        fc2=nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd),
        bn2=norm_layer(channels, **dd)))


class SpatialPyramidAttention(nn.Module):
    """Spatial Pyramid Attention, equations (1) to (5) of the paper.

    The gate is computed from the feature map that it rescales (variant a), from the input of the block (b), or from
    this input with its channels matched (c). timm's models with an attention slot take variant a as `attn_layer`, e.g.
    `timm.create_model('resnext50_32x4d', block_args=dict(attn_layer=timm_spa.SpatialPyramidAttention))`.
    """

    def __init__(
            self,
            channels: int,
            in_channels: Optional[int] = None,
            variant: str = 'a',
            pyramid_sizes: Sequence[int] = (1, 4, 7),
            rd_ratio: float = 1. / 16,
            rd_channels: Optional[int] = None,
            matcher_rd_channels: Optional[int] = None,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            gate_layer: LayerType = 'sigmoid',
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Channels of the gated map.
            in_channels: Channels of the block's input, for variants b and c; `channels` if None.
            variant: What the gate is learned from, one of 'a', 'b', 'c'.
            pyramid_sizes: Side lengths of the averages, in cells, in any order.
            rd_ratio: Width between the two convolutions over `channels`, rounded down, at least 1.
            rd_channels: That width itself, overrides `rd_ratio`.
            matcher_rd_channels: Width inside the channel matcher; that between the two convolutions if None.
            act_layer: Activation between the two convolutions.
            norm_layer: Norm layer after the first convolution, and in the channel matcher.
            gate_layer: Activation that makes the gate.

        Raises:
            ValueError: An argument is out of range.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        in_channels = channels if in_channels is None else in_channels
        rd_channels = max(1, int(channels * rd_ratio)) if rd_channels is None else rd_channels
        matcher_rd_channels = rd_channels if matcher_rd_channels is None else matcher_rd_channels
        _check_arguments(variant, pyramid_sizes, channels=channels, in_channels=in_channels, rd_channels=rd_channels,
                         matcher_rd_channels=matcher_rd_channels)
        self.channels, self.in_channels, self.variant = channels, in_channels, variant
        self.reads_block_input = variant != 'a'
        self.pyramid_sizes: List[int] = sorted(pyramid_sizes, reverse=True)  # TorchScript cannot loop over a tuple
        self.matcher: nn.Module = nn.Identity()
        if variant == 'c' and in_channels != channels:
            self.matcher = channel_matcher(in_channels, channels, matcher_rd_channels, act_layer, norm_layer, **dd)
            in_channels = channels
        # 1-D, as optimizers expect of parameters that are exempt from weight decay
        self.pyramid_weight = nn.Parameter(torch.empty(len(self.pyramid_sizes), **dd))
        self.fc1 = nn.Conv2d(in_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn = get_norm_layer(norm_layer)(rd_channels, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.gate = create_act_layer(gate_layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every pyramid weight to one, as the authors do."""
        nn.init.ones_(self.pyramid_weight)

    def forward_gate(self, source: torch.Tensor) -> torch.Tensor:
        """Computes the gate (N, channels, P, P), P the largest size, from (N, in_channels, H, W), equation (2)."""
        _check_shape('block_input' if self.reads_block_input else 'x', source, self.in_channels)
        pyramid = weighted_pyramid(self.matcher(source), self.pyramid_sizes, self.pyramid_weight)
        return self.gate(self.fc2(self.act(self.bn(self.fc1(pyramid)))))

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates `x`, (N, channels, H, W), equations (3) to (5); variants b and c need the block's input.

        Raises:
            ValueError: A map has another shape, or `block_input` is missing.
        """
        _check_shape('x', x, self.channels)
        source = block_input if self.reads_block_input else x
        if source is None:
            raise ValueError('Variants b and c of SpatialPyramidAttention need block_input, got None.')
        return apply_gate(x, self.forward_gate(source))


def _check_arguments(variant: str, pyramid_sizes: Sequence[int], **widths: int) -> None:
    wrong = [f'{name} must be at least 1, got {value}.' for name, value in widths.items() if value < 1]
    if variant not in ('a', 'b', 'c'):
        wrong.append(f"variant must be one of 'a', 'b', 'c', got {variant!r}.")
    if variant == 'a' and widths['in_channels'] != widths['channels']:
        wrong.append(f'in_channels must be channels in variant a, {widths["channels"]}, got {widths["in_channels"]}.')
    sizes = pyramid_sizes if isinstance(pyramid_sizes, (tuple, list)) else ()
    if not sizes or any(type(size) is not int or size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
        wrong.append(f'pyramid_sizes must be different whole numbers of at least 1, got {pyramid_sizes!r}.')
    if wrong:
        raise ValueError(' '.join(wrong))
