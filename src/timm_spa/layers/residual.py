"""The end of a residual block when no gradient is wanted: the same values with fewer passes over whole maps."""
from typing import Any, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .affine import is_affine, is_product, is_untouched, merge_norm, pyramid_through, scale_and_shift
from .conditions import is_known, multiplies_fast
from .gating import gate_regions
from .spatial_pyramid_attention import SpatialPyramidAttention

__all__ = ['gated_residual', 'pools_in_front', 'saves_passes']

# how many multiply-adds take as long as reading one value of a map to pool it
MACS_PER_READ = 10
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

    The pyramid is pooled in front of a pointwise convolution that widens a map, which then is one matrix product with
    the gate's first; the norm layer goes into the convolution's weights, which are fewer than the places of its output;
    product and sum are one pass.

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
    # the gate's first convolution as a matrix, if it multiplies what the convolution and the norm layer give out
    fc: Any = attn.fc1.weight.flatten(1) if not attn.reads_block_input and is_product(attn.fc1, x) else None
    in_front = fc is not None and pools_in_front(conv, fc.shape[0], sizes[0], x.shape)
    merges = _is_cheaper_by_weights(conv, x)
    hidden = None
    if in_front or merges:
        kernel, bias = merge_norm(conv, norm)
    if in_front:
        hidden = pyramid_through(x, sizes, weight, fc @ kernel.flatten(1), fc @ bias)

    if merges:
        y = F.conv2d(x, kernel, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    else:
        y = conv(x)
        if fc is not None and not in_front and torch.compiler.is_compiling():
            # if only the residual sum reads the norm layer's output, the compiler need not store it
            scale, shift = scale_and_shift(norm)
            hidden = pyramid_through(y, sizes, weight, (fc * scale).to(fc.dtype), fc @ shift.to(fc.dtype))
        y = norm(y)

    if hidden is not None:
        gate = attn.gate_of_hidden(hidden)
    else:
        gate = attn.forward_gate(block_input if attn.reads_block_input else y)
    return gate_regions(y, gate, shortcut, inplace=True)


def pools_in_front(conv: nn.Conv2d, hidden: int, size: int, shape: Sequence[int]) -> bool:
    """Tells whether a pyramid is better pooled in front of a convolution than behind it.

    Pooled behind it, more channels are read and multiplied with the gate's first weights; in front of it, those weights
    are multiplied with the convolution's first.

    Args:
        conv: Convolution.
        hidden: Channels behind the gate's first convolution.
        size: Largest size of the pyramid.
        shape: Of the convolution's input, (N, C, H, W).

    Returns:
        Whether it acts on every place alike, and less time is needed in front of it.
    """
    places, cells = shape[2] * shape[3], size ** 2
    # a map that is no larger than the pyramid is multiplied with the weights first, and pooled when it is narrow
    costs = hidden * places if is_known(places <= cells) else hidden * cells + MACS_PER_READ * places
    saved = shape[0] * (conv.out_channels - conv.in_channels) * costs
    return (
        conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        and is_known(saved > hidden * conv.out_channels * conv.in_channels))


def _is_cheaper_by_weights(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a norm layer costs less on the weights of a convolution than on its output, and rounds no worse."""
    if torch.compiler.is_compiling():
        return False  # the compiler merges it with what follows
    places = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    return (
        multiplies_fast(x) and x.dtype == conv.weight.dtype and conv.padding_mode == 'zeros'
        and places * conv.out_channels >= max(MIN_VALUES, MIN_PLACES_PER_WEIGHT * conv.weight.numel()))
