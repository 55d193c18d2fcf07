"""Modules that hold the gates of `add_attention`, and their attachment to layers of timm.

A gate stands behind the last norm layer or convolution of a residual branch: before the residual sum, before layer
scale, stochastic depth and the activation. timm's norm-activation layers have a slot between the two, `drop`, which
takes the gate. A bare norm layer becomes a norm-activation layer without an activation. A convolution becomes one of
the same class with a gate.
"""
from typing import TYPE_CHECKING, Any, Callable, Dict, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    FrozenBatchNormAct2d,
    GroupNorm,
    GroupNorm1,
    GroupNorm1Act,
    GroupNormAct,
    LayerNorm2d,
    LayerNormAct2d,
    SyncBatchNormAct,
    conv2d_same,
)
from timm.models.byobnet import RepVggBlock
from timm.models.ghostnet import GhostModule

from ._base import adopt

__all__ = [
    'BATCH_NORMS', 'CONVS', 'GateSlot', 'GatedConv2d', 'GatedConv2dSame', 'GatedGhostModule', 'NORMS', 'NORM_ACTS',
    'attach', 'gated_channels', 'linear_parameters', 'scaled_parameters']


class GateSlot(nn.Module):
    """The gate of one of timm's norm-activation layers, between norm and activation."""

    def __init__(self, attn: nn.Module, norm_name: str, parameters: Tuple[str, ...], drop: nn.Module):
        """
        Args:
            attn: Gate.
            norm_name: Name of the norm layer in the model.
            parameters: Names of its affine parameters.
            drop: What stood in the place before.
        """
        super().__init__()
        self.gated_prefix, self.gated_parameters = norm_name, parameters
        self.drop = drop
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gates the normalized feature map (N, C, H, W)."""
        return self.attn(self.drop(x))


class _Gated(nn.Module):
    """Mixin that takes over an existing module and gates the output of the next base class."""

    def __init__(self, original: nn.Module, attn: nn.Module, parameters: Tuple[str, ...]):
        """
        Args:
            original: The module; its parameters and layers are taken over.
            attn: Gate.
            parameters: Names of the parameters in which the output is linear, all together.
        """
        adopt(self, original)
        self.gated_parameters = parameters
        self.attn: nn.Module = attn


class GatedConv2d(_Gated, nn.Conv2d):
    """A convolution with a gate on its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        return self.attn(F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups))


class GatedConv2dSame(_Gated, Conv2dSame):
    """A convolution padded as TensorFlow does, with a gate on its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        return self.attn(conv2d_same(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups))


class GatedGhostModule(_Gated, GhostModule):
    """GhostNet's module with a gate on its two feature maps. The second is computed from the first."""
    if TYPE_CHECKING:  # TorchScript would read it
        primary_conv: nn.Module
        cheap_operation: nn.Module
    inverse_parameters = ('cheap_operation.0.weight',)  # reads the first feature map

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        maps = self.primary_conv(x)
        return self.attn(torch.cat([maps, self.cheap_operation(maps)], 1)[:, :self.out_chs])


CONVS: Dict[type, Any] = {nn.Conv2d: GatedConv2d, Conv2dSame: GatedConv2dSame}
# norm layers of feature maps (N, C, H, W), and the norm-activation layers that replace them
NORMS: Dict[type, Callable[[Any], nn.Module]] = {
    nn.BatchNorm2d: lambda norm: BatchNormAct2d(norm.num_features, apply_act=False),
    nn.SyncBatchNorm: lambda norm: SyncBatchNormAct(norm.num_features),
    nn.GroupNorm: lambda norm: GroupNormAct(norm.num_channels, norm.num_groups, apply_act=False),
    GroupNorm: lambda norm: GroupNormAct(norm.num_channels, norm.num_groups, apply_act=False),
    GroupNorm1: lambda norm: GroupNorm1Act(norm.num_channels, apply_act=False),
    LayerNorm2d: lambda norm: LayerNormAct2d(norm.normalized_shape[0], apply_act=False),
}
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)
NORM_ACTS = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d, GroupNormAct, GroupNorm1Act, LayerNormAct2d)


def linear_parameters(module: Any) -> Tuple[str, ...]:
    """Returns the names of the tensors that scale the output of a module if all are scaled by the same factor."""
    if isinstance(module, GhostModule):
        names = [f'{conv}.1.{key}' for conv in ('primary_conv', 'cheap_operation') for key in ('weight', 'bias')]
        return tuple(names)
    if isinstance(module, RepVggBlock):
        branches = ['conv_kxk.bn', 'conv_1x1.bn', *(['identity'] if module.identity is not None else [])]
        return tuple(f'{branch}.{key}' for branch in branches for key in ('weight', 'bias'))
    return tuple(key for key in ('weight', 'bias') if getattr(module, key, None) is not None)


def scaled_parameters(module: Any) -> Tuple[str, ...]:
    """Returns the names of all tensors of a module that change when its gate becomes neutral."""
    inverse = GatedGhostModule.inverse_parameters if isinstance(module, GhostModule) else ()
    return (*linear_parameters(module), *inverse)


def gated_channels(module: Any) -> int:
    """Returns the number of channels of a module's output."""
    if isinstance(module, RepVggBlock):
        return module.conv_kxk.bn.num_features
    if isinstance(module, GhostModule):
        return module.out_chs
    for key in ('out_channels', 'num_features', 'num_channels'):
        if hasattr(module, key):
            return getattr(module, key)
    return len(module.weight) if module.weight is not None else module.normalized_shape[0]


def attach(name: str, module: Any, attn: nn.Module) -> nn.Module:
    """Returns the module with the gate attached, or its replacement."""
    parameters = linear_parameters(module)
    if type(module) in CONVS:
        return CONVS[type(module)](module, attn, parameters)
    if isinstance(module, GhostModule):
        return GatedGhostModule(module, attn, parameters)
    if isinstance(module, RepVggBlock):
        module.attn = attn  # timm's own slot, after the sum of the branches; fusing keeps it
        module.gated_parameters = parameters
        return module
    if type(module) in NORMS:
        norm = NORMS[type(module)](module)
        norm.__dict__.update({k: v for k, v in module.__dict__.items() if k != '_modules'})
        module = norm
    module.drop = GateSlot(attn, name, parameters, getattr(module, 'drop', nn.Identity()))
    return module
