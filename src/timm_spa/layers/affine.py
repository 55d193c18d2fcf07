"""Pooling in front of layers that act on every place of a map alike, and affinely.

A mean of what such layers give out is what they make of the mean of their input, which may be a much smaller map.
"""
from typing import Any, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d

from .conditions import is_known, is_plain_tensor, is_planar, multiplies_fast
from .pyramid import weighted_pyramid

__all__ = ['is_affine', 'is_product', 'is_untouched', 'merge_norm', 'pointwise', 'pyramid_through', 'scale_and_shift']


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


def is_product(conv: nn.Module, x: torch.Tensor) -> bool:
    """Tells whether a convolution of kernel 1 is no more than a product with its weights.

    Args:
        conv: What stands in the place of the convolution.
        x: Its input, or what that is made of.

    Returns:
        Whether it has no bias, and does nothing but what its type and its weights say.
    """
    return type(conv) is nn.Conv2d and conv.bias is None and is_untouched(conv) and is_plain_tensor(x)


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


def scale_and_shift(norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Computes what a norm layer with stored statistics multiplies with, and adds.

    Args:
        norm: Norm layer of C channels for which `is_affine` holds.

    Returns:
        Two tensors of shape (C,), in float32 at least.
    """
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = norm.bias + shift
    return scale, shift


def merge_norm(conv: Any, norm: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Computes the weights and biases with which a convolution does the work of the norm layer after it too.

    Args:
        conv: Convolution of C channels for which, with the norm layer, `is_affine` holds.
        norm: Norm layer after it.

    Returns:
        Two tensors, of the shape of the convolution's weight and (C,), in its dtype.
    """
    scale, shift = scale_and_shift(norm)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype), shift.to(conv.weight.dtype)


def pyramid_through(
        x: torch.Tensor,
        sizes: List[int],
        weight: torch.Tensor,
        matrix: torch.Tensor,
        offset: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Computes the weighted pyramid of what an affine step makes of each place, before that step or after it.

    Args:
        x: Map, (N, C', H, W).
        sizes: Side lengths, the largest first.
        weight: Factor of each size, of shape (len(sizes),).
        matrix: What multiplies the channels of each place, (C, C').
        offset: What is added then, (C,); nothing if None.

    Returns:
        As `weighted_pyramid`, (N, C, sizes[0], sizes[0]).
    """
    if is_known(x.shape[2] * x.shape[3] <= sizes[0] ** 2) and matrix.shape[0] < matrix.shape[1]:
        return weighted_pyramid(pointwise(x, matrix, offset), sizes, weight)
    # the sum of the weights is the factor with which a constant comes through
    return pointwise(weighted_pyramid(x, sizes, weight), matrix, None if offset is None else offset * weight.sum())


def pointwise(x: torch.Tensor, matrix: torch.Tensor, offset: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Convolves a small map with a kernel of 1; on a CPU as a matrix product, which takes less time to set up.

    Args:
        x: Map, (N, C', H, W).
        matrix: Weights, (C, C').
        offset: Bias, (C,), or None.

    Returns:
        Map of shape (N, C, H, W).
    """
    if not multiplies_fast(x):
        return F.conv2d(x, matrix[:, :, None, None], None if offset is None else offset.to(matrix.dtype))
    if not is_planar(x):
        places = x.permute(0, 2, 3, 1)
        # flat, since the compiler multiplies row by row where it does not yet see that channels will lie side by side
        product = F.linear(places.flatten(0, 2), matrix, offset)
        return product.unflatten(0, places.shape[:3]).permute(0, 3, 1, 2)
    matrices, places = matrix.expand(x.shape[0], -1, -1), x.flatten(2)
    product = torch.bmm(matrices, places) if offset is None else torch.baddbmm(offset[:, None], matrices, places)
    return product.unflatten(2, x.shape[2:])
