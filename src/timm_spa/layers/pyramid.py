"""The two passes of attention over whole maps: pooling them to a pyramid, and gating them region by region.

Each is written twice. The plain form is what the equations say; the compiler, TorchScript and the exporter get it, and
it is used for every map that the other form does not cover. The eager form gives the same numbers, up to rounding, with
less memory traffic: it reads a map no more often than it must, and never makes an enlarged copy of a gate.
"""
import functools
from typing import List, Tuple

import torch
import torch.nn.functional as F

__all__ = ['gate_regions', 'weighted_pyramid']

# maps of up to so many places are pooled to all sizes by one matrix product, larger ones by rows and columns
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
        if not _is_eager(x):
            return _plain_pyramid(x, sizes, weight)
        # on a CPU, pooling strides through the rows of a map, unless the channels lie side by side
        if x.device.type == 'cpu' and x.is_contiguous() and x.dtype in (torch.float32, torch.float64):
            if x.shape[-2] * x.shape[-1] <= MAX_PLACES and not torch.is_grad_enabled():
                return _pyramid_by_one_product(x, tuple(sizes), weight)
            levels = _pool_by_products(x, tuple(sizes))
        else:
            levels = _pool(x, sizes)
        return _sum_up(levels, weight)


def gate_regions(x: torch.Tensor, gate: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Multiplies a map with a gate that is enlarged to it (nearest).

    Args:
        x: Map, (N, C, H, W).
        gate: Gate, (N, C, P, P).
        inplace: Write the result to `x`, if no gradient is wanted.

    Returns:
        The gated map, (N, C, H, W).
    """
    if torch.jit.is_scripting():
        return x * F.interpolate(gate, size=x.shape[-2:], mode='nearest')
    else:  # noqa: RET505
        # the gradient of a broadcast gate is a sum over parts of rows, slower than that of an enlarged one
        if not _is_eager(x) or torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
            return x * F.interpolate(gate, size=x.shape[-2:], mode='nearest')
        height, width = x.shape[-2:]
        size = gate.shape[-1]
        if height % size or width % size:
            return x * F.interpolate(gate, size=(height, width), mode='nearest')
        # the map's rows and columns are split into regions, over which the gate is broadcast
        if (height, width) == (size, size):
            regions = x
        elif x.is_contiguous():
            gate = gate[..., None].expand(*gate.shape, width // size).reshape(*gate.shape[:3], 1, width)
            regions = x.view(*gate.shape[:3], height // size, width)
        else:
            regions = x.unflatten(2, (size, height // size)).unflatten(4, (size, width // size))
            gate = gate[:, :, :, None, :, None]
        inplace = inplace and not torch.is_grad_enabled() and gate.dtype == x.dtype
        product = regions.mul_(gate) if inplace else regions * gate
        return product.reshape(x.shape)


def _is_eager(x: torch.Tensor) -> bool:
    """Whether the shape of a map is no more than numbers, and its data are there."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _plain_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    pyramid = F.adaptive_avg_pool2d(x, sizes[0]) * weight[0]
    for i in range(1, len(sizes)):
        level = F.interpolate(F.adaptive_avg_pool2d(x, sizes[i]), size=sizes[0], mode='nearest')
        pyramid = pyramid + level * weight[i]
    return pyramid


def _pool(x: torch.Tensor, sizes: List[int]) -> List[torch.Tensor]:
    """Averages a map to every size; means of equal regions are averaged further."""
    height, width = x.shape[-2:]
    largest = sizes[0]
    fine = x if (height, width) == (largest, largest) else F.adaptive_avg_pool2d(x, largest)
    even = height % largest == 0 and width % largest == 0
    return [fine, *(F.adaptive_avg_pool2d(fine if even and largest % size == 0 else x, size) for size in sizes[1:])]


def _pool_by_products(x: torch.Tensor, sizes: Tuple[int, ...]) -> List[torch.Tensor]:
    """Averages a map to every size: its rows to all of them in one matrix product, and then its columns."""
    height, width = x.shape[-2:]
    rows = x @ _averages(width, sizes, x.device, x.dtype)
    both = (rows.transpose(2, 3) @ _averages(height, sizes, x.device, x.dtype)).transpose(2, 3)
    levels, start = [], 0
    for size in sizes:
        levels.append(both[:, :, start:start + size, start:start + size])
        start += size
    return levels


def _pyramid_by_one_product(x: torch.Tensor, sizes: Tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    levels = _enlarged_averages(height, width, sizes, x.device, x.dtype)
    matrix = (weight @ levels.flatten(1)).view(levels.shape[1:])
    return (x.view(batch * channels, height * width) @ matrix).view(batch, channels, sizes[0], sizes[0])


def _sum_up(levels: List[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    pyramid = levels[0] * weight[0]
    for i, level in enumerate(levels[1:], start=1):
        level = level * weight[i]
        # one place needs no enlarging; nothing keeps the sum before this one, with a gradient or without
        pyramid += level if level.shape[-1] == 1 else F.interpolate(level, size=pyramid.shape[-2:], mode='nearest')
    return pyramid


@functools.lru_cache(maxsize=64)
def _averages(length: int, sizes: Tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns a matrix (length, sum of sizes) whose columns are the means of adaptive pooling to each size."""
    with torch.inference_mode(False):
        matrix = torch.zeros(length, sum(sizes), device=device, dtype=dtype)
        column = 0
        for size in sizes:
            for i in range(size):
                start, end = i * length // size, -(-(i + 1) * length // size)
                matrix[start:end, column] = 1 / (end - start)
                column += 1
        return matrix


@functools.lru_cache(maxsize=64)
def _enlarged_averages(
        height: int,
        width: int,
        sizes: Tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Returns for each size the matrix (height * width, P * P) that pools to it and enlarges the result to P."""
    with torch.inference_mode(False):
        matrices = []
        for size in sizes:
            nearest = torch.arange(sizes[0]) * size // sizes[0]
            rows, columns = (_averages(length, (size,), device, dtype)[:, nearest] for length in (height, width))
            matrices.append(torch.kron(rows, columns))
        return torch.stack(matrices)
