"""The form of a residual block for inference, which `fuse()` returns when timm's `reparameterize_model` asks for it."""
import logging
from typing import Any, Iterable, List, Optional

import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SEModule
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .comparison_gates import SelfGate, SqueezeExcite
from .spatial_pyramid_attn import SpatialPyramidAttention, apply_gate, weighted_pyramid

__all__ = ['FusedBranch', 'fuse_branch', 'merge_norms']

_logger = logging.getLogger(__name__)
torch.fx.wrap('apply_gate')
torch.fx.wrap('weighted_pyramid')

CONVS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, FrozenBatchNormAct2d)


def merge_norms(modules: Iterable[nn.Module]) -> nn.Sequential:
    """Returns the layers that are left when each norm layer is merged into the convolution in front of it.

    Args:
        modules: Layers in the order of their calls; an `nn.Sequential` stands for its layers.

    Raises:
        ValueError: A norm layer has no stored statistics, or no convolution in front of it.
    """
    merged: List[Any] = []
    module: Any
    for module in nn.Sequential(*modules).children():
        if type(module) is nn.Sequential:
            merged.extend(merge_norms(module))
        elif type(module) in NORMS:
            if not merged or type(merged[-1]) not in CONVS or getattr(module, 'running_mean', None) is None:
                raise ValueError(f'{type(module).__name__} has no stored statistics or no convolution in front of it')
            merged[-1] = fuse_conv_bn_eval(merged[-1], module)
            merged.append(getattr(module, 'act', nn.Identity()))
        else:
            merged.append(module)
    return nn.Sequential(*(m for m in merged if not isinstance(m, nn.Identity)))


class FusedBranch(nn.Module):
    """A residual block for inference: `act(last(body(x)) * gate + shortcut(x))`.

    Norm layers are merged into the convolutions. Averaging and pointwise convolutions commute, so the pyramid is pooled
    in front of the branch's last convolution where that one widens the map (variant a), or in front of the matcher's
    last one (variant c); that convolution and the gate's first one are a single matrix then.
    """

    def __init__(
            self,
            attn: Any,
            body: Iterable[nn.Module],
            last: Iterable[nn.Module],
            shortcut: Optional[Iterable[nn.Module]],
            act: nn.Module,
    ):
        """
        Args:
            attn: Gate, one of SPA's variants or squeeze-and-excitation.
            body: Layers of the branch without `last`.
            last: Last convolution and norm layer of the branch.
            shortcut: Layers of the shortcut; None for a block without a residual sum.
            act: Activation after the sum.

        Raises:
            ValueError: A layer cannot be merged exactly.
        """
        super().__init__()
        self.body, self.last = merge_norms(body), _only_conv(last)
        self.has_shortcut = shortcut is not None
        self.shortcut = merge_norms(shortcut or ())
        self.final_act = act
        self.reads = 'input' if attn.reads_block_input else 'output'
        self.matcher = merge_norms([getattr(attn, 'matcher', nn.Identity())])
        gate: Any = attn.layer if isinstance(attn, SelfGate) else attn
        self.is_pyramid = type(gate) is SpatialPyramidAttention  # a subclass may compute something else
        if self.is_pyramid:
            self.pyramid_sizes: List[int] = gate.pyramid_sizes
            weight, fc1 = gate.pyramid_weight.detach().clone(), _only_conv([gate.fc1, gate.bn])
        elif type(gate) in (SqueezeExcite, SEModule) and not getattr(gate, 'add_maxpool', False):
            self.pyramid_sizes = [1]
            weight, fc1 = torch.ones_like(gate.fc1.weight[0, 0, 0]), _only_conv([gate.fc1])
        else:
            raise ValueError(f'{type(gate).__name__} has no fused form')
        conv, pointwise = self.last, None
        widens = conv.out_channels > conv.in_channels and conv.groups == 1
        if len(self.matcher):
            pointwise = self.matcher.pop(-1)
        elif self.reads == 'output' and widens and conv.kernel_size == conv.stride == (1, 1):
            self.reads, pointwise = 'body', conv
        self.pyramid_weight = nn.Parameter(weight, requires_grad=False)
        self.fc1 = fc1 if pointwise is None else _merge_pointwise(pointwise, fc1, weight.sum())
        self.act, self.fc2, self.gate = gate.act, gate.fc2, gate.gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        y = self.body(x)
        out = self.last(y)
        source = self.matcher(x) if self.reads == 'input' else y if self.reads == 'body' else out
        pyramid = weighted_pyramid(source, self.pyramid_sizes, self.pyramid_weight)
        gate = self.gate(self.fc2(self.act(self.fc1(pyramid))))
        return self.final_act(apply_gate(out, gate, self.shortcut(x) if self.has_shortcut else None))


def _only_conv(modules: Iterable[nn.Module]) -> Any:
    merged = merge_norms(modules)
    if len(merged) != 1 or type(merged[0]) not in CONVS:
        kinds = ', '.join(type(m).__name__ for m in modules)
        raise ValueError(f'{kinds} is not a convolution with a norm layer to merge')
    return merged[0]


def _merge_pointwise(first: Any, second: Any, total: torch.Tensor) -> nn.Conv2d:
    """Merges two pointwise convolutions, between which averages are summed with weights of the given total."""
    a, b = first.weight.flatten(1), second.weight.flatten(1)
    conv: Any = nn.Conv2d(a.shape[1], b.shape[0], 1, device=a.device, dtype=a.dtype)
    bias = torch.zeros_like(conv.bias) if first.bias is None else b @ first.bias * total
    with torch.no_grad():
        conv.weight.copy_((b @ a)[:, :, None, None])
        conv.bias.copy_(bias if second.bias is None else bias + second.bias)
    return conv


def fuse_branch(block: nn.Module, **parts: Any) -> nn.Module:
    """Returns the fused form of a block, or the block itself, with a warning that says why, if it has none.

    Args:
        block: Residual block with a gate `attn`.
        **parts: Arguments of `FusedBranch` other than the gate.
    """
    try:
        for name, module in block.named_modules():
            # a hook, a parametrization or a replaced forward would be lost
            touched = 'forward' in vars(module) or module._forward_hooks or module._forward_pre_hooks
            if module.training or touched or nn.utils.parametrize.is_parametrized(module):
                reason = 'in training mode' if module.training else 'wrapped or has hooks'
                raise ValueError(f'{name or "it"} is {reason}')
        return FusedBranch(block.attn, **parts)
    except ValueError as e:
        _logger.warning(f'{type(block).__name__} is unchanged by fuse(): {e}.')
        return block
