"""Pooling in front of layers that act on every place of a map alike, and affinely.

A mean of what such layers give out is what they make of the mean of their input, which may be a much smaller map.
"""
from typing import Any, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from .conditions import is_plain_tensor, multiplies_fast
from .pyramid import weighted_pyramid

__all__ = ['is_affine', 'is_untouched', 'pointwise', 'pyramid_in_front', 'scale_and_shift']


def is_affine(conv: nn.Module, norm: nn.Module, x: torch.Tensor) -> bool:
    """Tells whether a convolution and a norm layer are affine, and can be taken apart.

    Args:
        conv: Convolution, of any kernel.
        norm: Norm layer after it.
        x: Input of the convolution.

    Returns:
        Whether no gradient is wanted, the norm layer uses stored statistics, and neither does anything but what its
        type and parameters say: no hook, no wrapper, no quantized weight.
    """
    return (
        not torch.is_grad_enabled() and is_plain_tensor(x) and type(conv) is nn.Conv2d and _is_stored_norm(norm)
        and is_untouched(conv) and is_untouched(norm))


def is_untouched(module: nn.Module) -> bool:
    """Tells whether a call of a module is no more than its `forward`, with parameters that are plain numbers.

    Args:
        module: Any module.

    Returns:
        Whether it has no hook, its `forward` is that of its class, and its parameters are no subclass of torch's.
    """
    state = module.__dict__  # faster than the attributes of a module
    return not (
        state['_forward_hooks'] or state['_forward_pre_hooks'] or 'forward' in state
        or any(p is not None and type(p) is not nn.Parameter for p in state['_parameters'].values()))


def _is_stored_norm(norm: Any) -> bool:
    if type(norm) is BatchNormAct2d:
        known = type(norm.act) is nn.Identity and type(norm.drop) is nn.Identity
    else:
        known = type(norm) is nn.BatchNorm2d
    return known and not norm.training and norm.running_mean is not None


def scale_and_shift(norm: Any, conv: Any = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """Computes what a norm layer with stored statistics multiplies with, and adds.

    Args:
        norm: Norm layer of C channels for which `is_affine` holds.
        conv: Convolution in front of it whose bias, if it has one, is to be part of what is added.

    Returns:
        Two tensors of shape (C, 1, 1), in float32 at least.
    """
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = norm.bias + shift
    if conv is not None and conv.bias is not None:
        shift = shift + conv.bias * scale
    return scale[:, None, None], shift[:, None, None]


def pyramid_in_front(
        conv: Any,
        norm: Any,
        x: torch.Tensor,
        sizes: List[int],
        weight: torch.Tensor,
) -> torch.Tensor:
    """Computes the weighted pyramid of `norm(conv(x))` from the averages of `x`.

    Args:
        conv: Convolution of kernel 1 and stride 1 for which `is_affine` holds, or None if there is none.
        norm: Norm layer for which it holds.
        x: Map, (N, C', H, W).
        sizes: Side lengths, the largest first.
        weight: Factor of each size, of shape (len(sizes),).

    Returns:
        As `weighted_pyramid` of the norm layer's output, (N, C, sizes[0], sizes[0]).
    """
    scale, shift = scale_and_shift(norm, conv)
    pyramid = weighted_pyramid(x, sizes, weight)
    if conv is not None:
        pyramid = pointwise(pyramid, conv.weight)
    # the sum of the weights is the factor with which a constant comes through
    return torch.addcmul(shift * weight.sum(), pyramid, scale).to(x.dtype)


def pointwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Convolves a small map with a kernel of 1; on a CPU as a matrix product, which takes less time to set up.

    Args:
        x: Map, (N, C', H, W).
        weight: Weights of a convolution, (C, C', 1, 1).

    Returns:
        Map of shape (N, C, H, W).
    """
    if not multiplies_fast(x):
        return F.conv2d(x, weight)
    weight = weight.flatten(1)
    if x.is_contiguous():
        return torch.bmm(weight.expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])
    return F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
