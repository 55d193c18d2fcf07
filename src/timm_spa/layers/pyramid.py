"""The two passes of attention over whole maps: pooling them to a pyramid, and gating them region by region.

Each is written more than once. The plain form is what the equations say; TorchScript and the exporter get it, and it is
used for every map that no other form covers. The other forms give the same numbers, up to rounding, with less memory
traffic: they read a map no more often than they must, and never make an enlarged copy of a large map's gate.
"""
import functools
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = ['gate_regions', 'is_known', 'is_plain_tensor', 'multiplies_fast', 'weighted_pyramid']

_is_exporting: Callable[[], bool] = getattr(torch.compiler, 'is_exporting', bool)  # since torch 2.7

# maps of up to so many places are pooled by one matrix product; in larger ones the columns are averaged before
MAX_PLACES = 256
# the same for maps whose channels lie side by side, which are pooled well
MAX_PLACES_OF_CHANNELS = 64
# a gate is enlarged to the whole map if its rows are no longer than this, else to one row of each region
MAX_SHORT_ROW = 16


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
        if not is_plain_tensor(x):
            return _plain_pyramid(x, sizes, weight)
        compiling = torch.compiler.is_compiling()
        places = x.shape[-2] * x.shape[-1]
        # on a CPU, pooling strides through the rows of a map, unless the channels lie side by side
        if _is_planar(x) and (not compiling or is_known(places <= MAX_PLACES)):
            return _pyramid_by_products(x, tuple(sizes), weight)
        if compiling:
            return _plain_pyramid(x, sizes, weight)
        if places <= MAX_PLACES_OF_CHANNELS and multiplies_fast(x) and x.is_contiguous(
                memory_format=torch.channels_last):
            return _pyramid_by_products(x, tuple(sizes), weight)
        return _pyramid_of_pools(x, sizes, weight)


def gate_regions(
        x: torch.Tensor,
        gate: torch.Tensor,
        shortcut: Optional[torch.Tensor] = None,
        inplace: bool = False,
) -> torch.Tensor:
    """Multiplies a map with a gate that is enlarged to it (nearest), and adds the shortcut of a residual block.

    Args:
        x: Map, (N, C, H, W).
        gate: Gate, (N, C, P, P).
        shortcut: Map to add, of the shape of `x`.
        inplace: Write the result to `x`, if no gradient is wanted.

    Returns:
        The gated map, (N, C, H, W).
    """
    if torch.jit.is_scripting():
        x = x * F.interpolate(gate, size=x.shape[-2:], mode='nearest')
        return x if shortcut is None else x + shortcut
    else:  # noqa: RET505
        height, width = x.shape[-2:]
        size = gate.shape[-1]
        compiling = torch.compiler.is_compiling()
        same_dtype = gate.dtype == x.dtype and (shortcut is None or shortcut.dtype == x.dtype)
        # the gradient of a broadcast gate is a sum over parts of rows, slower than that of an enlarged one
        plain = not is_plain_tensor(x) or torch.is_grad_enabled() or not same_dtype
        if plain or compiling or height % size or width % size:
            if compiling and not plain and x.is_cpu:
                gate = _enlarge_compiled(gate, x)
            else:
                gate = F.interpolate(gate, size=(height, width), mode='nearest')
            x = x * gate
            return x if shortcut is None else x + shortcut

        batch, channels = x.shape[:2]
        # rows, and in one case columns too, are split into regions, over which the gate is broadcast
        shape: Tuple[int, ...] = x.shape
        if (height, width) != (size, size):
            if not x.is_contiguous():
                shape = (batch, channels, size, height // size, size, width // size)
                gate = gate[:, :, :, None, :, None]
            elif width > MAX_SHORT_ROW:
                shape = (batch, channels, size, height // size, width)
                gate = _enlarge_rows(gate, width, 1)
            else:
                gate = _enlarge_rows(gate, width, height // size).view(shape)
        regions = x.view(shape)
        out = regions if inplace else None
        if shortcut is None:
            product = torch.mul(regions, gate, out=out)
        else:
            product = torch.addcmul(shortcut.view(shape), regions, gate, out=out)
        return product.reshape(x.shape) if out is None else x


def is_plain_tensor(x: torch.Tensor) -> bool:
    """Tells whether a map is just numbers in memory, not a stand-in for others or for what is recorded.

    Args:
        x: Map.

    Returns:
        Whether a form may be chosen by its shape and layout, and written in place. A compiler's maps count: it does
        both well. An exporter's do not: its graphs are for all shapes.
    """
    return not (
        type(x) is not torch.Tensor or x.is_meta or torch.jit.is_tracing() or _is_exporting()
        or torch._C._are_functorch_transforms_active())


def is_known(condition: Any) -> bool:
    """Tells whether a condition on the shape of a map holds for sure.

    Args:
        condition: Comparison of numbers, or while compiling of what stands for them.

    Returns:
        False also if it is not known: compiled code for all shapes must not become code for some.
    """
    return statically_known_true(condition) if torch.compiler.is_compiling() else condition


def multiplies_fast(x: torch.Tensor) -> bool:
    """Tells whether matrix products are a good way to work on a map.

    Args:
        x: Map.

    Returns:
        Whether they are as exact as sums, and on this device often faster than the layers that do the same.
    """
    return (
        x.is_cpu and (x.dtype is torch.float32 or x.dtype is torch.float64) and not torch.is_autocast_enabled('cpu'))


def _enlarge_compiled(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Enlarges a gate, and keeps the compiler from computing it anew for every place that it is enlarged to."""
    height, width = x.shape[-2:]
    size = gate.shape[-1]
    if x.is_contiguous() and is_known(height % size == 0) and is_known(width % size == 0) and is_known(width > size):
        # loads that follow the rows of a map are faster still
        return _enlarge_rows(gate, width, 1).expand(-1, -1, -1, height // size, -1).reshape(x.shape)
    # the compiler stores what is seen with other strides
    stored = torch.as_strided(gate, gate.shape, gate.stride())
    return F.interpolate(stored, size=(height, width), mode='nearest')


def _is_planar(x: torch.Tensor) -> bool:
    """Whether the rows of a map lie one behind the other, and may be multiplied."""
    return x.is_contiguous() and multiplies_fast(x)


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
    matrices = _pyramid_matrices.__wrapped__ if torch.compiler.is_compiling() else _pyramid_matrices
    first, levels = matrices(height, width, sizes, x.device, x.dtype)
    if first is not None:
        x = first @ x
    matrix = (weight.to(x.dtype) @ levels.flatten(1)).view(levels.shape[1:])
    if x.is_contiguous():
        return (x.reshape(batch * channels, -1) @ matrix).view(batch, channels, sizes[0], sizes[0])
    return (matrix.t() @ x.permute(0, 2, 3, 1).flatten(1, 2)).unflatten(1, (sizes[0], sizes[0])).permute(0, 3, 1, 2)


def _enlarge_rows(gate: torch.Tensor, width: int, copies: int) -> torch.Tensor:
    """Repeats the places of each row, and the row that comes of it; a product with zeros and ones is the fastest way.

    Args:
        gate: Gate, (N, C, P, P).
        width: Length of the new rows.
        copies: Number of times that each row comes.

    Returns:
        Gate of shape (N, C, P, copies, width).
    """
    size = gate.shape[-1]
    if not _is_planar(gate):
        rows = gate[:, :, :, None, :, None].expand(-1, -1, -1, copies, -1, width // size)
    else:
        repeats = _repeats.__wrapped__ if torch.compiler.is_compiling() else _repeats
        rows = gate.view(-1, size) @ repeats(size, width, copies, gate.device, gate.dtype)
    return rows.reshape(*gate.shape[:3], copies, width)


@functools.lru_cache(maxsize=64)
def _repeats(size: int, width: int, copies: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns the matrix (size, copies * width) that repeats the places of a row, and then all of it."""
    with torch.inference_mode(False):
        return torch.eye(size, device=device, dtype=dtype).repeat_interleave(width // size, 1).repeat(1, copies)


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
