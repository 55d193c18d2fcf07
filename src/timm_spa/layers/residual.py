"""The end of a residual block when no gradient is wanted: the same values with fewer passes over whole maps."""
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .affine import is_affine, is_untouched, pyramid_in_front, scale_and_shift
from .conditions import is_known, multiplies_fast
from .gating import gate_regions
from .pyramid import weighted_pyramid
from .spatial_pyramid_attention import SpatialPyramidAttention

__all__ = ['gated_residual', 'pools_in_front', 'saves_passes']

# how many times the places of the pyramid a map must have to be pooled in front of a convolution that widens it
MIN_PLACES_RATIO = 8
# how many places a map must have for each weight of an output channel, for the norm layer to go into the weights
MIN_PLACES_PER_WEIGHT = 4
# how many values that output must have, for it to take longer than the few steps that change the weights
MIN_VALUES = 2 ** 17


def saves_passes(
        attn: nn.Module,
        conv: nn.Module,
        norm: nn.Module,
        drop_path: Optional[nn.Module],
        x: torch.Tensor,
) -> bool:
    """Tells whether `gated_residual` may stand in for calls of these modules.

    Args:
        attn: Gate of the branch.
        conv: Last convolution of the branch.
        norm: Norm layer after it.
        drop_path: Stochastic depth after the gate.
        x: Input of the convolution.

    Returns:
        Whether the gate is SPA, `is_affine` holds for the others, and nothing is dropped.
    """
    return (
        type(attn) is SpatialPyramidAttention and is_untouched(attn) and is_affine(conv, norm, x)
        and (drop_path is None or not drop_path.training or type(drop_path) is nn.Identity))


def gated_residual(
        attn: Any,
        conv: Any,
        norm: Any,
        x: torch.Tensor,
        block_input: torch.Tensor,
        shortcut: Optional[torch.Tensor],
) -> torch.Tensor:
    """Computes `attn(norm(conv(x)), block_input) + shortcut`.

    The pyramid is pooled in front of a pointwise convolution that widens a large map; the norm layer goes into the
    convolution's weights, which are fewer than the places of its output; product and sum are one pass.

    Args:
        attn: Gate for which, with the next three arguments, `saves_passes` holds.
        conv: Last convolution of the branch.
        norm: Norm layer after it.
        x: Input of the convolution, (N, C', H', W').
        block_input: Input of the block, which variants b and c read.
        shortcut: Map to add, (N, C, H, W), or None for a block without a residual sum.

    Returns:
        The block's output before its last activation, (N, C, H, W).
    """
    sizes, weight = attn.level_sizes, attn.pyramid_weight
    reads_map = not attn.reads_block_input
    pyramid = None
    if reads_map and pools_in_front(conv, x.shape[2] * x.shape[3], sizes[0]):
        pyramid = pyramid_in_front(conv, norm, x, sizes, weight)

    if _is_cheaper_by_weights(conv, x):
        y = _conv_and_norm(conv, norm, x)
    else:
        y = conv(x)
        if reads_map and pyramid is None and torch.compiler.is_compiling():
            # if only the residual sum reads the norm layer's output, the compiler need not store it
            pyramid = pyramid_in_front(None, norm, y, sizes, weight)
        y = norm(y)

    if reads_map:
        gate = attn.gate_of_pyramid(weighted_pyramid(y, sizes, weight) if pyramid is None else pyramid)
    else:
        gate = attn.forward_gate(block_input)
    return gate_regions(y, gate, shortcut, inplace=True)


def pools_in_front(conv: nn.Conv2d, places: int, size: int) -> bool:
    """Tells whether a pyramid is better pooled in front of a convolution than behind it.

    Args:
        conv: Convolution.
        places: Height times width of its input.
        size: Largest size of the pyramid.

    Returns:
        Whether it acts on every place alike, gives out more channels than it reads, and the map is large.
    """
    return (
        conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        and conv.in_channels < conv.out_channels and is_known(places >= MIN_PLACES_RATIO * size ** 2))


def _is_cheaper_by_weights(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a norm layer costs less on the weights of a convolution than on its output, and rounds no worse."""
    if torch.compiler.is_compiling():
        return False  # the compiler merges it with what follows
    places = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    return (
        multiplies_fast(x) and x.dtype == conv.weight.dtype and conv.padding_mode == 'zeros'
        and places * conv.out_channels >= max(MIN_VALUES, MIN_PLACES_PER_WEIGHT * conv.weight.numel()))


def _conv_and_norm(conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    scale, shift = scale_and_shift(norm, conv)
    return F.conv2d(
        x, conv.weight * scale[..., None], shift.flatten(), conv.stride, conv.padding, conv.dilation, conv.groups)
