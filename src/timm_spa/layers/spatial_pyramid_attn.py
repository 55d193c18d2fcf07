"""Spatial Pyramid Attention (SPA).

Paper: `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
"""
from collections import OrderedDict
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType, create_act_layer, get_norm_layer

__all__ = ['SpatialPyramidAttention', 'apply_gate', 'channel_matcher', 'weighted_pyramid']


@torch.fx.wrap
def weighted_pyramid(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Averages a map (N, C, H, W) to sizes, the largest first, and sums them there with weights, equation (1)."""
    if not torch.jit.is_scripting() and x.is_cuda and torch.compiler.is_compiling() and not _is_exporting():
        return _pyramid_product(x, sizes, weight)
    pyramid = _average_pool(x, sizes[0]) * weight[0]
    for i in range(1, len(sizes)):
        level = _average_pool(x, sizes[i]) * weight[i]
        pyramid = pyramid + (level if sizes[i] == 1 else F.interpolate(level, size=sizes[0], mode='nearest'))
    return pyramid


def _pyramid_product(x: torch.Tensor, sizes: List[int], weight: torch.Tensor) -> torch.Tensor:
    """Does so with a single matrix, for compiled code on a GPU: pooling is slow there, and not part of its kernels."""
    averages, cell = torch.zeros((), device=x.device), torch.arange(sizes[0], device=x.device)
    for i, size in enumerate(sizes):
        rows, columns = (_averages(length, size, weight)[cell * size // sizes[0]] for length in x.shape[2:])
        averages = averages + weight[i] * torch.kron(rows, columns)
    pixels, averages = x.flatten(2), averages.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # a mean keeps the precision of its map
        if x.is_contiguous():
            y = pixels @ averages.transpose(0, 1)
        else:
            y = (averages @ pixels.transpose(1, 2)).transpose(1, 2)
    return y.unflatten(2, (sizes[0], sizes[0]))


@torch.jit.unused
def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # newer than torch 2.5
    return torch.onnx.is_in_onnx_export() or is_exporting()


def _average_pool(x: torch.Tensor, size: int) -> torch.Tensor:
    if not torch.jit.is_scripting() and size > 1 and _is_exporting():
        # exporters freeze adaptive pooling to the size of the example, matrix products hold for every size
        return _averages(x.shape[2], size, x) @ x @ _averages(x.shape[3], size, x).transpose(0, 1)
    return F.adaptive_avg_pool2d(x, size)


def _averages(length: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Returns the matrix (size, length) that averages the cells of adaptive pooling."""
    place, cell = torch.arange(length, device=like.device), torch.arange(size, device=like.device).unsqueeze(1)
    start, end = cell * length // size, ((cell + 1) * length + size - 1) // size
    return ((place >= start) & (place < end)).to(like.dtype) / (end - start).to(like.dtype)


@torch.fx.wrap
def apply_gate(x: torch.Tensor, gate: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Multiplies a map (N, C, H, W) by a gate (N, C, P, P) resized to it (nearest), and adds the shortcut, if any."""
    if not torch.jit.is_scripting() and _broadcasts_rows(x, gate):
        # the same bits with less memory traffic; in NCHW, torch's resizing is the slower way to repeat columns
        size = gate.shape[2]
        gate = (gate.repeat_interleave(x.shape[3] // size, 3) if gate.is_contiguous() else
                F.interpolate(gate, size=(size, x.shape[3]), mode='nearest').to(gate.dtype))
        gate, shape = gate.unsqueeze(3), (size, x.shape[2] // size)
        y = x.unflatten(2, shape)
        return (y * gate if shortcut is None else torch.addcmul(shortcut.unflatten(2, shape), y, gate)).flatten(2, 3)
    # on CUDA, autocast resizes in float32: all that follows would be float32 too
    gate = F.interpolate(gate, size=x.shape[-2:], mode='nearest').to(gate.dtype)
    return x * gate if shortcut is None else torch.addcmul(shortcut, x, gate)


@torch.jit.unused
def _broadcasts_rows(x: torch.Tensor, gate: torch.Tensor) -> bool:
    is_recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()  # which has to hold for other shapes
    if is_recorded or torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
        return False  # the gradient of a broadcast is slow in channels_last
    # from a factor of 41 on, torch's nearest resizing rounds some indices down
    return all(x.shape[i] % gate.shape[i] == 0 and x.shape[i] <= 40 * gate.shape[i] for i in (2, 3))


@torch.fx.wrap
def _check_shape(name: str, x: torch.Tensor, channels: int) -> None:
    if not torch.jit.is_tracing() and (x.dim() != 4 or x.shape[1] != channels):
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

    Variant a learns the gate from the map that it gates, b from the input of the block that made the map, c from that
    input with its channels matched. timm's models with an attention slot take variant a as `attn_layer`, e.g.
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
