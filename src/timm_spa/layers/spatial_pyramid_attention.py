"""Spatial Pyramid Attention.

Paper: `Spatial Pyramid Attention for Deep Convolutional Neural Networks` (SPANet), IEEE Transactions on Multimedia,
https://doi.org/10.1109/TMM.2021.3068576; first published at ICME 2020, https://doi.org/10.1109/ICME46284.2020.9102906

Where squeeze-and-excitation describes a feature map by one global mean per channel, SPA describes it by a small pyramid
of means (1x1, 4x4 and 7x7 for ImageNet) that keeps part of the spatial structure, and gates the map region by region.
"""
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import LayerType, create_act_layer, register_notrace_module

from .affine import is_affine, is_product, is_untouched, merge_norm, pointwise, pyramid_through
from .gating import gate_regions
from .pyramid import weighted_pyramid

__all__ = ['ChannelMatcher', 'SpatialPyramidAttention']

VARIANTS = ('a', 'b', 'c')


class ChannelMatcher(nn.Module):
    """Brings the channels of a block's input to those of its output, the psi of equation (5).

    conv 1x1 - norm - act - conv 1x1 - norm, without conv biases.
    """

    def __init__(
            self,
            in_channels: int,
            channels: int,
            rd_channels: int,
            act_layer: LayerType = nn.ReLU,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_channels: Channels of the input.
            channels: Channels of the output.
            rd_channels: Width between the two convolutions.
            act_layer: Activation after the first norm layer.
            norm_layer: Norm layer after each convolution.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Conv2d(in_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn1 = norm_layer(rd_channels, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.bn2 = norm_layer(channels, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, in_channels, H, W) to (N, channels, H, W)."""
        x = self.act(self.bn1(self.fc1(x)))
        return self.bn2(self.fc2(x))


@register_notrace_module  # how a map is pooled depends on its shape, which a symbolic trace does not know
class SpatialPyramidAttention(nn.Module):
    """Spatial Pyramid Attention, equations (1) to (5) of the paper.

    The source map is averaged to every size of the pyramid, each average is brought to the largest size (nearest), and
    they are summed with one learned weight per size. Two 1x1 convolutions and a sigmoid turn the sum into a gate of the
    pyramid's largest size, which is enlarged (nearest) to the gated map and multiplied with it.

    The variants differ in the source:
      * a - the gated map itself, equation (3)
      * b - the input of the block that made the gated map, equation (4)
      * c - as b, with a channel matcher in front where the channels differ, equation (5)

    Any height and width will do, also ones smaller than the pyramid or not divisible by its sizes. The output has the
    shape, dtype and memory format of the gated map.

    Attributes:
        pyramid_weight: One weight per size, in the order of `pyramid_sizes`: the largest size first. It is
            one-dimensional, so that optimizers which exempt 1-D parameters from weight decay exempt it.
    """
    level_sizes: List[int]

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
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            gate_layer: LayerType = 'sigmoid',
            inplace: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Channels of the gated map.
            in_channels: Channels of the block's input, for variants b and c; `channels` if None.
            variant: Where the gate is learned from, one of 'a', 'b', 'c'.
            pyramid_sizes: Side lengths of the square pooled maps, in cells, in any order.
            rd_ratio: Width between the two convolutions over `channels`, rounded down, at least 1.
            rd_channels: That width itself, overrides `rd_ratio`.
            matcher_rd_channels: Width inside the channel matcher; that between the two convolutions if None.
            act_layer: Activation between the two convolutions.
            norm_layer: Norm layer after the first convolution (and in the channel matcher).
            gate_layer: Activation that makes the gate.
            inplace: Without a gradient, write the result to the gated map, which is fresh wherever a layer made it.

        Raises:
            ValueError: An argument is out of range; the message names it and its value.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f'variant must be one of {", ".join(map(repr, VARIANTS))}, got {variant!r}.')
        in_channels = channels if in_channels is None else in_channels
        sizes = _checked_pyramid_sizes(pyramid_sizes)
        rd_channels = max(1, int(channels * rd_ratio)) if rd_channels is None else rd_channels
        matcher_rd_channels = rd_channels if matcher_rd_channels is None else matcher_rd_channels
        for name, value in (
                ('channels', channels), ('in_channels', in_channels), ('rd_channels', rd_channels),
                ('matcher_rd_channels', matcher_rd_channels)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}.')
        if variant == 'a' and in_channels != channels:
            raise ValueError(
                f'variant a gates the map that it reads: in_channels must be channels ({channels}), got {in_channels}.')

        self.variant = variant
        self.reads_block_input = variant != 'a'
        self.pyramid_sizes = sizes
        self.level_sizes = list(sizes)  # a list, because TorchScript can't loop over a tuple
        self.inplace = inplace

        if variant == 'c' and in_channels != channels:
            self.matcher: nn.Module = ChannelMatcher(
                in_channels, channels, matcher_rd_channels, act_layer, norm_layer, **dd)
            in_channels = channels
        else:
            self.matcher = nn.Identity()
        self.pyramid_weight = nn.Parameter(torch.empty(len(sizes), **dd))
        self.fc1 = nn.Conv2d(in_channels, rd_channels, kernel_size=1, bias=False, **dd)
        self.bn = norm_layer(rd_channels, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=False, **dd)
        self.gate = create_act_layer(gate_layer, inplace=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every pyramid weight to one, the authors' start. The submodules reset themselves."""
        nn.init.ones_(self.pyramid_weight)

    def extra_repr(self) -> str:
        """Describes what no submodule shows."""
        return f'variant={self.variant}, pyramid_sizes={self.pyramid_sizes}'

    def forward_gate(self, source: torch.Tensor) -> torch.Tensor:
        """Computes the gate before it is enlarged, equations (1) and (2).

        Args:
            source: The map that the gate is learned from, (N, in_channels, H, W).

        Returns:
            Gate of shape (N, channels, P, P), P the largest pyramid size, values in (0, 1) for a sigmoid.
        """
        if torch.jit.is_scripting():
            return self._plain_gate(source)
        else:  # noqa: RET505  TorchScript would compile what follows a return
            if not is_product(self.fc1, source):
                return self._plain_gate(source)
            matrix, offset = self.fc1.weight.flatten(1), None
            if self._matches_affinely(source):
                # pooled where the matcher is narrow: its end and the next convolution are one matrix
                matcher: Any = self.matcher
                source = matcher.act(matcher.bn1(matcher.fc1(source)))
                kernel, bias = merge_norm(matcher.fc2, matcher.bn2)
                matrix, offset = matrix @ kernel.flatten(1), matrix @ bias
            else:
                source = self.matcher(source)
            return self.gate_of_hidden(
                pyramid_through(source, self.level_sizes, self.pyramid_weight, matrix, offset))

    def _plain_gate(self, source: torch.Tensor) -> torch.Tensor:
        pyramid = weighted_pyramid(self.matcher(source), self.level_sizes, self.pyramid_weight)
        return self.gate_of_hidden(self.fc1(pyramid))

    def gate_of_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes the gate from what its first convolution gives out, the rest of equation (2).

        Args:
            hidden: Map of shape (N, rd_channels, P, P).

        Returns:
            Gate of shape (N, channels, P, P).
        """
        hidden = self.act(self.bn(hidden))
        if torch.jit.is_scripting():
            return self.gate(self.fc2(hidden))
        else:  # noqa: RET505
            if not is_product(self.fc2, hidden):
                return self.gate(self.fc2(hidden))
            return self.gate(pointwise(hidden, self.fc2.weight.flatten(1)))

    @torch.jit.unused
    def _matches_affinely(self, source: torch.Tensor) -> bool:
        """Whether the end of the matcher may be applied after pooling."""
        return (
            type(self.matcher) is ChannelMatcher and is_untouched(self.matcher)
            and is_affine(self.matcher.fc2, self.matcher.bn2, source))

    def forward(self, x: torch.Tensor, block_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gates a map.

        Args:
            x: The map to gate, (N, channels, H, W).
            block_input: Input of the block that made `x`, (N, in_channels, H', W'). Variants b and c learn the gate
                from it, variant a does not read it.

        Returns:
            The gated map, (N, channels, H, W).

        Raises:
            ValueError: Variant b or c was called without `block_input`.
        """
        source = x
        if self.reads_block_input:
            if block_input is None:
                raise ValueError('Variants b and c of SpatialPyramidAttention need block_input, got None.')
            source = block_input
        gate = self.forward_gate(source)
        return gate_regions(x, gate, None, self.inplace)


def _checked_pyramid_sizes(pyramid_sizes: Sequence[int]) -> Tuple[int, ...]:
    """Returns the sizes from large to small, the order of the weights."""
    if isinstance(pyramid_sizes, str) or not isinstance(pyramid_sizes, Sequence):
        raise ValueError(f'pyramid_sizes must be a sequence of whole numbers, got {pyramid_sizes!r}.')
    if not pyramid_sizes:
        raise ValueError(f'pyramid_sizes must name at least one size, got {pyramid_sizes!r}.')
    for size in pyramid_sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f'pyramid_sizes must be whole numbers of at least 1, got {size!r} in {pyramid_sizes!r}.')
    if len(set(pyramid_sizes)) != len(pyramid_sizes):
        raise ValueError(f'pyramid_sizes must differ from each other, got {pyramid_sizes!r}.')
    return tuple(sorted(pyramid_sizes, reverse=True))
