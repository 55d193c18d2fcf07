"""Pooling of a map to a pyramid.

It is written more than once. The plain form is what the equation says; TorchScript and the exporter get it, torch's
compiler makes good code of it, and it is used for every map that no other form covers. The other forms give the same
numbers, up to rounding, with less memory traffic: they read a map no more often than they must.
"""
import functools
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

from .conditions import is_plain_tensor, is_planar

__all__ = ['weighted_pyramid']

# maps of up to so many places are pooled by one matrix product; in larger ones the columns are averaged before
MAX_PLACES = 256


def weighted_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Averages a map to every size of a pyramid, enlarges each to the first size (nearest), and adds them up.

    Equation (1) of the paper.

    Args:
        x: Map, (N, C, H, W).
        sizes: Side lengths, the largest first.
        weight: Factor of each size, of shape (len(sizes),).

    Returns:
        The sum, (N, C, sizes[0], sizes[0]).
    """
    if torch.jit.is_scripting():
        return _plain_pyramid(x, sizes, weight)
    else:  # noqa: RET505  TorchScript would compile what follows a return
        if torch.compiler.is_compiling() or not is_plain_tensor(x):
            return _plain_pyramid(x, sizes, weight)
        # on a CPU, pooling strides through the rows of a map, unless the channels lie side by side
        if is_planar(x):
            return _pyramid_by_products(x, tuple(sizes), weight)
        return _pyramid_of_pools(x, sizes, weight)


def _plain_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    pyramid = F.adaptive_avg_pool2d(x, sizes[0]) * weight[0]
    for i in range(1, len(sizes)):
        level = F.interpolate(F.adaptive_avg_pool2d(x, sizes[i]), size=sizes[0], mode='nearest')
        pyramid = pyramid + level * weight[i]
    return pyramid


def _pyramid_of_pools(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Averages the means of equal regions further, where that gives the same."""
    height, width = x.shape[-2:]
    largest = sizes[0]
    finest = x if (height, width) == (largest, largest) else F.adaptive_avg_pool2d(x, largest)
    even = height % largest == 0 and width % largest == 0
    factors = weight.unbind()
    coarse = None
    for i in range(len(sizes) - 1, 0, -1):
        level = F.adaptive_avg_pool2d(finest if even and largest % sizes[i] == 0 else x, sizes[i]) * factors[i]
        if coarse is not None and coarse.shape[-1] == 1:  # one place is enlarged with the next level
            level, coarse = level + coarse, None
        if sizes[i] > 1:
            level = F.interpolate(level, size=largest, mode='nearest')
        coarse = level if coarse is None else coarse + level
    return finest * factors[0] if coarse is None else torch.addcmul(coarse, finest, factors[0])


def _pyramid_by_products(x: torch.Tensor, sizes: Tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
    """Pooling, enlarging and adding up are linear: one matrix does them all, for few places at once."""
    batch, channels, height, width = x.shape
    first, levels = _pyramid_matrices(height, width, sizes, x.device, x.dtype)
    if first is not None:
        x = first @ x
    matrix = (weight.to(x.dtype) @ levels.flatten(1)).view(levels.shape[1:])
    return (x.view(batch * channels, -1) @ matrix).view(batch, channels, sizes[0], sizes[0])


@functools.lru_cache(maxsize=64)
def _pyramid_matrices(
        height: int,
        width: int,
        sizes: Tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
) -> Tuple[Optional[torch.Tensor], torch.Tensor]:
    """Returns what pools a map and enlarges the result to P, the largest size.

    Returns:
        A matrix that averages columns to all sizes, (sum of sizes, H), or None for a map of few places; and for each
        size the matrix that does the rest, (sum of sizes or H, W, P * P) with the first two dimensions in one.
    """
    with torch.inference_mode(False):
        columns, rows = [
            [_averages(length, size, device, dtype) for size in sizes] for length in (height, width)]
        enlarge = [torch.arange(sizes[0], device=device) * size // sizes[0] for size in sizes]
        first = None
        if height * width > MAX_PLACES:
            first = torch.cat(columns, 1).t().contiguous()
            columns = list(torch.eye(sum(sizes), device=device, dtype=dtype).split(sizes, 1))
        return first, torch.stack([
            torch.kron(c[:, to].contiguous(), r[:, to].contiguous())
            for c, r, to in zip(columns, rows, enlarge, strict=True)])


def _averages(length: int, size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns a matrix (length, size) whose columns are the means of adaptive pooling."""
    place = torch.arange(length, device=device)[:, None]
    cell = torch.arange(size, device=device)
    start, end = cell * length // size, -(-(cell + 1) * length // size)
    return ((start <= place) & (place < end)).to(dtype) / (end - start)
