"""Formulas for the equations of `spatial_pyramid_attn`: the same results, computed to suit how the model is run.

Eager code keeps little for the backward pass. Compiled code consists of arithmetic that a compiler fuses. Exported
graphs hold constant matrices where the image size is fixed, and matrices computed from it where it is free. TorchScript
and plain traces keep the equations themselves. Only this file asks torch how the model is being run.
"""
import contextlib
import functools
import math
import struct
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch.fx.experimental import symbolic_shapes

from .torchscript import is_tracing

__all__ = ['fixed_sizes', 'gate_formula', 'pyramid_formula']

# each may be missing, e.g. `has_static_value` came with torch 2.8
_is_in_onnx_export = getattr(torch.onnx, 'is_in_onnx_export', lambda: False)
_is_torch_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)
_has_static_value = getattr(symbolic_shapes, 'has_static_value', lambda n: False)
_traces_fixed_sizes = False
MATRIX_ENTRIES = 2 ** 17  # of the largest matrix for a whole pyramid in an exported graph, 512 KiB in float32
PIXELS_OF_SMALL_CELLS = 16  # so few that compiled code reads a feature map again rather than keeping its averages


@contextlib.contextmanager
def fixed_sizes() -> Iterator[None]:
    """Makes traces inside the context hold for the image size of the example only.

    `torch.jit.trace` and the legacy ONNX exporter cannot tell a fixed size from a free one, and get formulas for any
    size otherwise.
    """
    global _traces_fixed_sizes
    before, _traces_fixed_sizes = _traces_fixed_sizes, True
    try:
        yield
    finally:
        _traces_fixed_sizes = before


def pyramid_formula(x: torch.Tensor) -> Optional[Callable[..., torch.Tensor]]:
    """Returns the function for equation (1) of a feature map `x`, None for the equation itself."""
    return _choose(x, _eager_pyramid, _compiled_pyramid, _constant_pyramid, _free_pyramid)


def gate_formula(x: torch.Tensor) -> Optional[Callable[..., torch.Tensor]]:
    """Returns the function that applies a gate to a feature map `x`, None for the equation itself."""
    return _choose(x, GateProduct.apply, _compiled_gate, _constant_gate, None)


def _choose(x: torch.Tensor, eager: Any, compiled: Any, constant: Any, free: Any) -> Any:
    if is_tracing() and _traces_fixed_sizes:
        return constant
    if _is_torch_exporting() or _is_in_onnx_export():
        return constant if not is_tracing() and _has_fixed_size(x) else free
    if torch.compiler.is_compiling():
        return compiled if _has_fixed_size(x) else None
    return None if is_tracing() else eager


def _has_fixed_size(x: torch.Tensor) -> bool:
    return _has_static_value(x.shape[2]) and _has_static_value(x.shape[3])


# Eager code


class GateProduct(torch.autograd.Function):
    """The feature map times the gate resized to it (nearest), plus the shortcut, if any.

    Keeps the gate at its own size for the backward pass, not at that of the feature map.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, gate: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Returns the gated feature map."""
        height, width = gate.shape[2:]
        if not _divides(x, height, width):
            gate = _resize(gate, x.shape[2], x.shape[3])
            return x * gate if shortcut is None else torch.addcmul(shortcut, x, gate)
        if gate.shape == x.shape:
            return x * gate if shortcut is None else torch.addcmul(shortcut, x, gate)
        y, gate = _cells(x, height, width), gate.unsqueeze(3).unsqueeze(5)
        y = y * gate if shortcut is None else torch.addcmul(_cells(shortcut, height, width), y, gate)
        # torch forbids writing to a view that a function returns, e.g. by an in-place sum with the shortcut
        return y.flatten(4, 5).flatten(2, 3).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: torch.Tensor) -> None:
        """Keeps what the gradients need."""
        x, gate = inputs[:2]
        needs_x, needs_gate = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_gate else None, gate if needs_x else None)
        ctx.save_for_forward(x, gate)
        ctx.dtypes, ctx.cells = (x.dtype, gate.dtype), gate.shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        """Returns the gradients of feature map, gate and shortcut."""
        x, gate = ctx.saved_tensors
        grad_x = None if gate is None else GateProduct.apply(grad, gate, None).to(ctx.dtypes[0])
        grad_gate = None if x is None else _sum_of_cells(grad * x, *ctx.cells).to(ctx.dtypes[1])
        return grad_x, grad_gate, grad if ctx.needs_input_grad[2] else None

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, dgate: torch.Tensor, dshortcut: Optional[torch.Tensor]) -> torch.Tensor:
        """Returns the derivative in a direction."""
        x, gate = ctx.saved_tensors
        return GateProduct.apply(dx, gate, dshortcut) + GateProduct.apply(x, dgate, None)


class WeightedSum(torch.autograd.Function):
    """The weighted sum of the levels of a feature map `x`.

    Keeps `x`, which other layers keep too, and computes the levels again for the gradient of the weights.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], *levels: torch.Tensor) -> torch.Tensor:
        """Returns the pyramid."""
        pyramid = levels[0] * weight[0]
        for i, level in enumerate(levels[1:], 1):
            pyramid = pyramid + level * weight[i]
        return pyramid

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: torch.Tensor) -> None:
        """Keeps what the gradients need."""
        x, weight, ctx.sizes, *levels = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.save_for_forward(weight, *levels)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        """Returns the gradients of weights and levels; that of `x` flows through the levels."""
        x, weight = ctx.saved_tensors
        grad_weight = None
        if x is not None:
            grad_weight = torch.stack([(grad * level).sum() for level in _eager_levels(x, ctx.sizes)]).to(weight.dtype)
        grads = [grad.sum((2, 3), keepdim=True) if size == 1 < ctx.sizes[0] else grad for size in ctx.sizes]
        return None, grad_weight, None, *(g * weight[i] for i, g in enumerate(grads))

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, dweight: torch.Tensor, sizes: None, *dlevels: torch.Tensor) -> torch.Tensor:
        """Returns the derivative in a direction."""
        weight, *levels = ctx.saved_tensors
        pairs = enumerate(zip(levels, dlevels, strict=True))
        return sum(dlevel * weight[i] + level * dweight[i] for i, (level, dlevel) in pairs)


def _eager_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    return WeightedSum.apply(x, weight, tuple(sizes), *_eager_levels(x, sizes))


def _eager_levels(x: torch.Tensor, sizes: Sequence[int]) -> List[torch.Tensor]:
    """Returns the averages of each size, resized to the first one; an average of the whole is left as it is."""
    levels = _levels(x, sizes, _pool)
    return [level if level.shape[2] == 1 else _resize(level, sizes[0], sizes[0]) for level in levels]


def _pool(x: torch.Tensor, size: int) -> torch.Tensor:
    if _divides(x, size, size):
        return F.avg_pool2d(x, (x.shape[2] // size, x.shape[3] // size))
    return F.adaptive_avg_pool2d(x, size)


def _levels(x: torch.Tensor, sizes: Sequence[int], pool: Callable[[torch.Tensor, int], torch.Tensor]) -> List[Any]:
    """Returns the averages of each size, from the averages of a finer size where cells of equal size nest."""
    levels: List[torch.Tensor] = []
    for size in sizes:
        finer = [i for i, n in enumerate(sizes[:len(levels)]) if n % size == 0 and _divides(x, n, n)]
        if finer:
            # neither keeps its input for the backward pass, pooling would
            level = levels[finer[-1]]
            level = level.mean((2, 3), keepdim=True) if size == 1 else _cells(level, size, size).mean((3, 5))
        else:
            level = x if x.shape[2] == x.shape[3] == size else pool(x, size)
        levels.append(level)
    return levels


def _divides(x: torch.Tensor, height: int, width: int) -> bool:
    return x.shape[2] % height == 0 and x.shape[3] % width == 0


def _cells(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Splits (N, C, H, W) into cells, (N, C, height, H / height, width, W / width)."""
    return x.unflatten(3, (width, x.shape[3] // width)).unflatten(2, (height, x.shape[2] // height))


def _resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes (nearest): the index of the source is rounded down exactly, where torch's own may come out lower."""
    if x.shape[2] == height and x.shape[3] == width:
        return x
    if _is_exact(x.shape[2], height) and _is_exact(x.shape[3], width):
        # on CUDA, autocast resizes in float32: all that follows would be float32 too
        return F.interpolate(x, size=(height, width), mode='nearest').to(x.dtype)
    return x[:, :, _nearest(x, height, 2)][:, :, :, _nearest(x, width, 3)]


def _nearest(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    return torch.arange(length, device=x.device) * x.shape[dim] // length


@functools.cache
def _is_exact(size: int, length: int) -> bool:
    """Whether torch's nearest resizing, which computes in float32, rounds every index down correctly."""
    def float32(value: float) -> float:
        return struct.unpack('f', struct.pack('f', value))[0]

    scale = float32(size / length)
    return all(int(float32(i * scale)) == i * size // length for i in range(length))


def _sum_of_cells(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sums over the pixels that `_resize` copies each of (height, width) cells to."""
    if x.shape[2] == height and x.shape[3] == width:
        return x
    if _divides(x, height, width):
        return F.avg_pool2d(x, (x.shape[2] // height, x.shape[3] // width), divisor_override=1)
    rows, columns = _membership(height, x.shape[2], x), _membership(width, x.shape[3], x)
    is_available = torch.amp.is_autocast_available(x.device.type)  # not on the meta device
    with torch.autocast(x.device.type, enabled=False) if is_available else contextlib.nullcontext():
        return rows.transpose(0, 1) @ x @ columns


# Compiled code of a known size: views, slices and means


def _compiled_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """A compiler keeps what a weight multiplies for its gradient: the coarse levels, before they are resized.

    Where the cells of the finest level are small, the weight multiplies `x` itself, which is computed again.
    """
    cells, pyramid = sizes[0], torch.zeros((), dtype=x.dtype, device=x.device)
    for i, level in enumerate(_levels(x, sizes, _mean_of_cells)):
        if i == 0 and 1 < x.shape[2] * x.shape[3] // cells ** 2 <= PIXELS_OF_SMALL_CELLS and _divides(x, cells, cells):
            level = _mean_of_cells(x * weight[i], cells)
        else:
            level = level * weight[i]
        if 1 < sizes[i] != cells:
            level = _copies(_copies(level, cells, 2), cells, 3)
        pyramid = pyramid + level
    return pyramid


def _mean_of_cells(x: torch.Tensor, size: int) -> torch.Tensor:
    if _divides(x, size, size):
        x = x.unflatten(3, (size, x.shape[3] // size)).mean(4)
        return x.unflatten(2, (size, x.shape[2] // size)).mean(3)
    return _means_of_slices(_means_of_slices(x, size, 3), size, 2)


def _means_of_slices(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Averages over cells that overlap. A compiler makes slow loops of sums with a matrix of averages."""
    spans = [_span(cell, x.shape[dim], size) for cell in range(size)]
    return torch.stack([x.narrow(dim, start, end - start).mean(dim) for start, end in spans], dim)


def _copies(x: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Resizes a dimension (nearest). Slices have a faster backward pass than an index."""
    sources = [place * x.shape[dim] // length for place in range(length)]
    shape = list(x.shape)
    copies = []
    for source in sorted(set(sources)):
        shape[dim] = sources.count(source)
        copies.append(x.narrow(dim, source, 1).expand(shape))
    return torch.cat(copies, dim)


def _compiled_gate(x: torch.Tensor, gate: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
    height, width = gate.shape[2:]
    if _divides(x, height, width):
        y = (_cells(x, height, width) * gate.unsqueeze(3).unsqueeze(5)).flatten(4, 5).flatten(2, 3)
    else:
        y = x * _copies(_copies(gate, x.shape[2], 2), x.shape[3], 3)
    return y if shortcut is None else shortcut + y


# Exported graphs


def _free_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Averages by a matrix for the rows and one for the columns of each size, computed from the size of `x`."""
    cells, levels = sizes[0], []
    for i, size in enumerate(sizes):
        if size == 1:
            levels.append(x.mean((2, 3), keepdim=True) * weight[i])
        else:
            nearest = torch.tensor([cell * size // cells for cell in range(cells)], device=x.device).unsqueeze(1)
            rows, columns = (_averages(size, length, x, nearest) for length in x.shape[2:])
            levels.append(rows @ x @ columns.transpose(0, 1) * weight[i])
    return sum(levels[1:], levels[0])


def _constant_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Averages by one constant matrix, after average pooling to the coarsest grid that the cells of all sizes allow."""
    cells = sizes[0]
    channels, *sides = (int(n) for n in x.shape[1:])
    pools = [_common_factor(length, sizes) for length in sides]
    if pools != [1, 1]:
        x = F.avg_pool2d(x, pools)
    height, width = (length // pool for length, pool in zip(sides, pools, strict=True))
    if len(sizes) == 1 and height == width == cells:
        return x * weight
    if height * width * cells ** 2 <= MATRIX_ENTRIES:
        matrices = _pyramid_matrices(height, width, tuple(sizes), x.dtype, x.device)
        terms = weight.reshape(-1, 1, 1) * matrices
        # exporters make a constant of it, the legacy ONNX exporter of a sum of terms only
        matrix = sum((terms[i] for i in range(1, len(sizes))), terms[0]) if is_tracing() else terms.sum(0)
        return (x.reshape(-1, channels, height * width) @ matrix).reshape(-1, channels, cells, cells)
    levels = []
    for i, size in enumerate(sizes):
        if size == 1:
            levels.append(x.mean((2, 3), keepdim=True) * weight[i])
        else:
            rows, columns = (_average_matrix(n, size, cells, x.dtype, x.device) for n in (height, width))
            levels.append(rows @ x @ columns.transpose(0, 1) * weight[i])
    return sum(levels[1:], levels[0])


def _constant_gate(x: torch.Tensor, gate: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Resizes the gate by whole factors, which every converter reads alike, or by constant indices or matrices."""
    (height, width), (rows, columns) = ([int(n) for n in tensor.shape[2:]] for tensor in (gate, x))
    if (height, width) != (rows, columns):
        if rows % height == columns % width == 0 and _is_exact(height, rows) and _is_exact(width, columns):
            resized = F.interpolate(gate, scale_factor=(rows // height, columns // width), mode='nearest')
            gate = resized if resized.dtype == gate.dtype else resized.to(gate.dtype)
        elif is_tracing() and not _is_in_onnx_export():  # ncnn has no layer for indices
            gate = _nearest_matrix(height, rows, gate) @ gate @ _nearest_matrix(width, columns, gate).transpose(0, 1)
        else:
            for dim, size, length in ((2, height, rows), (3, width, columns)):
                if size != length:
                    index = torch.tensor([place * size // length for place in range(length)], device=x.device)
                    gate = gate.index_select(dim, index)
    y = x * gate
    return y if shortcut is None else shortcut + y


# Matrices


def _membership(size: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the matrix (length, size) that resizes (nearest)."""
    place, cell = torch.arange(length, device=like.device).unsqueeze(1), torch.arange(size, device=like.device)
    return torch.logical_and(place * size >= cell * length, place * size < (cell + 1) * length).to(like.dtype)


def _averages(size: int, length: int, like: torch.Tensor, cell: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Returns the matrix (size, length) that averages the cells of adaptive pooling, or those of the index `cell`.

    Cell i goes from floor(i * length / size) to ceil((i + 1) * length / size). Converters refuse integer division.
    """
    place = torch.arange(length, device=like.device)
    if cell is None:
        cell = torch.arange(size, device=like.device).unsqueeze(1)
    inside = torch.logical_and((place + 1) * size > cell * length, place * size < (cell + 1) * length).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _common_factor(length: int, sizes: Sequence[int]) -> int:
    """Returns the largest number of pixels that divides every start and end of a cell."""
    return math.gcd(*(edge for size in sizes for cell in range(size) for edge in _span(cell, length, size)))


def _span(cell: int, length: int, size: int) -> Tuple[int, int]:
    return cell * length // size, -(-(cell + 1) * length // size)


def _average_rows(length: int, size: int, cells: int) -> List[List[float]]:
    """Returns the averages (cells, length) of the cells of adaptive pooling to `size`, resized to `cells` (nearest)."""
    rows = []
    for cell in range(cells):
        start, end = _span(cell * size // cells, length, size)
        rows.append([1 / (end - start) if start <= place < end else 0. for place in range(length)])
    return rows


def _nearest_matrix(size: int, length: int, like: torch.Tensor) -> torch.Tensor:
    rows = [[float(place * size // length == cell) for cell in range(size)] for place in range(length)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


@torch.compiler.assume_constant_result
def _average_matrix(length: int, size: int, cells: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(_average_rows(length, size, cells), dtype=dtype, device=device)


@torch.compiler.assume_constant_result
def _pyramid_matrices(
        height: int,
        width: int,
        sizes: Tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
) -> torch.Tensor:
    """Returns the matrices (sizes, height * width, cells * cells) of all levels; `cells` is the first size."""
    matrices = []
    for size in sizes:
        rows, columns = (_average_rows(length, size, sizes[0]) for length in (height, width))
        matrices.append([[row[i] * column[j] for row in rows for column in columns]
                         for i in range(height) for j in range(width)])
    return torch.tensor(matrices, dtype=dtype, device=device)
