"""ResNet with attention at the end of every residual branch, on timm's ResNet.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385

The gate sits after the last norm layer of the branch, before the residual sum, where timm's ResNet has its attention
slot. The blocks here differ from timm's only in that the gate may read the block's input too, as variants B and C of
the paper do, and keep the names of timm's parameters.
"""
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..layers import fuse_branch
from ._base import GatedNet
from ._builder import build_model, untrained_cfg, warm_cfgs
from ._entrypoints import Family, split_gate

__all__ = ['GatedBasicBlock', 'GatedBottleneck', 'GatedResNet']


class _GatedBlock:  # no nn.Module, so that types of timm's attributes come first
    """What the gated blocks add to timm's. Comes before timm's class among the bases of a block."""

    def __init__(
            self: Any,
            inplanes: int,
            planes: int,
            *args: Any,
            make_gate: Callable[..., nn.Module],
            **kwargs: Any,
    ):
        """
        Args:
            inplanes: Channels of the input.
            planes: Channels of the branch, those of the output over `expansion`.
            *args: Positional arguments of timm's block.
            make_gate: Makes the gate, see `build_model`.
            **kwargs: Arguments of timm's block.

        Raises:
            ValueError: timm's own attention is asked for.
        """
        if kwargs.get('attn_layer') is not None:
            raise ValueError(
                f'The blocks take no attn_layer, got {kwargs["attn_layer"]!r}. Choose attention with gate=.')
        super().__init__(inplanes, planes, *args, **kwargs)  # type: ignore[call-arg]  # timm's class is next
        self.attn = make_gate(planes * self.expansion, inplanes, **_shared(kwargs))


class GatedBasicBlock(_GatedBlock, BasicBlock):
    """timm's basic block with a gate on its residual branch."""
    gated_parameters = ('bn2.weight', 'bn2.bias')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inplanes, H, W) to (N, planes * expansion, H / stride, W / stride)."""
        block_input = x

        x = self.bn1(self.conv1(x))
        x = self.aa(self.act1(self.drop_block(x)))
        shortcut = block_input if self.downsample is None else self.downsample(block_input)
        x = self.bn2(self.conv2(x))
        x = self.attn(x, block_input)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act2(x)

    def fuse(self) -> nn.Module:
        """Returns the form for inference, see `timm_spa.layers.FusedBranch`."""
        return fuse_branch(
            self, body=[self.conv1, self.bn1, self.drop_block, self.act1, self.aa], last=[self.conv2, self.bn2],
            shortcut=self.downsample or (), act=self.act2)


class GatedBottleneck(_GatedBlock, Bottleneck):
    """timm's bottleneck block with a gate on its residual branch."""
    gated_parameters = ('bn3.weight', 'bn3.bias')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inplanes, H, W) to (N, planes * expansion, H / stride, W / stride)."""
        block_input = x

        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.aa(self.act2(self.drop_block(x)))
        shortcut = block_input if self.downsample is None else self.downsample(block_input)
        x = self.bn3(self.conv3(x))
        x = self.attn(x, block_input)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act3(x)

    def fuse(self) -> nn.Module:
        """Returns the form for inference, see `timm_spa.layers.FusedBranch`."""
        body = [self.conv1, self.bn1, self.act1, self.conv2, self.bn2, self.drop_block, self.act2, self.aa]
        return fuse_branch(
            self, body=body, last=[self.conv3, self.bn3], shortcut=self.downsample or (), act=self.act3)


def _shared(block_args: Dict[str, Any]) -> Dict[str, Any]:
    return {k: block_args[k] for k in ('norm_layer', 'device', 'dtype') if k in block_args}


class GatedResNet(GatedNet, ResNet):
    """timm's ResNet with a gate in every block."""

    def __init__(
            self,
            *args: Any,
            make_gate: Callable[..., nn.Module],
            block_args: Optional[Dict[str, Any]] = None,
            **kwargs: Any,
    ):
        """
        Args:
            *args: Positional arguments of timm's ResNet.
            make_gate: Makes the gate of a block, see `build_model`.
            block_args: Further arguments of every block.
            **kwargs: Arguments of timm's ResNet.
        """
        super().__init__(*args, block_args=dict(block_args or {}, make_gate=make_gate), **kwargs)

    def init_convs(self, zero_init_last: bool = True) -> None:
        """Initializes convolutions as timm does.

        Args:
            zero_init_last: Start every residual branch from zero, by its last norm layer.
        """
        ResNet.init_weights(self, zero_init_last=zero_init_last)


_BASES: Dict[str, Dict[str, Any]] = {
    'resnet18': dict(block=GatedBasicBlock, layers=(2, 2, 2, 2)),
    'resnet34': dict(block=GatedBasicBlock, layers=(3, 4, 6, 3)),
    'resnet50': dict(block=GatedBottleneck, layers=(3, 4, 6, 3)),
    'resnet101': dict(block=GatedBottleneck, layers=(3, 4, 23, 3)),
    'resnet152': dict(block=GatedBottleneck, layers=(3, 8, 36, 3)),
    'resnet50d': dict(
        block=GatedBottleneck, layers=(3, 4, 6, 3), stem_width=32, stem_type='deep', avg_down=True),
    'resnet101d': dict(
        block=GatedBottleneck, layers=(3, 4, 23, 3), stem_width=32, stem_type='deep', avg_down=True),
    'resnext50_32x4d': dict(block=GatedBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    'resnext101_32x8d': dict(block=GatedBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8),
    'wide_resnet50_2': dict(block=GatedBottleneck, layers=(3, 4, 6, 3), base_width=128),
}


def _create_resnet(variant: str, pretrained: bool, base: str, **kwargs: Any) -> GatedResNet:
    return build_model(GatedResNet, variant, pretrained, **dict(_BASES[base], **kwargs))


_DEFAULTS = {base: 'a1_in1k' for base in ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152')}


def _cfgs(name: str) -> Dict[str, Any]:
    base, gate, _ = split_gate(name)
    if gate == 'ge':  # has no weights that make it neutral
        return {f'{name}.untrained': untrained_cfg(f'{base}.a1_in1k')}
    return warm_cfgs(name, base, _DEFAULTS.get(base, ''))


def _describe(base: str) -> str:
    for prefix, title in (('resnet', 'ResNet'), ('resnext', 'ResNeXt'), ('wide_resnet', 'Wide ResNet')):
        if base.startswith(prefix):
            return f'{title}-{base.removeprefix(prefix).upper() if prefix == "resnet" else base.removeprefix(prefix)}'
    raise ValueError(base)


default_cfgs: Dict[str, Any] = {}
register = Family(__name__, _create_resnet, _BASES, _describe, _cfgs)

spa_resnet18 = register('spa_resnet18')
spa_resnet34 = register('spa_resnet34')
spa_resnet50 = register('spa_resnet50')
spa_resnet101 = register('spa_resnet101')
spa_resnet152 = register('spa_resnet152')
spa_b_resnet18 = register('spa_b_resnet18')
spa_b_resnet34 = register('spa_b_resnet34')
spa_b_resnet50 = register('spa_b_resnet50')
spa_b_resnet101 = register('spa_b_resnet101')
spa_b_resnet152 = register('spa_b_resnet152')
spa_c_resnet18 = register('spa_c_resnet18')
spa_c_resnet34 = register('spa_c_resnet34')
spa_c_resnet50 = register('spa_c_resnet50')
spa_c_resnet101 = register('spa_c_resnet101')
spa_c_resnet152 = register('spa_c_resnet152')
# tables III and VI compare with these; timm has the plain networks and seresnet50
ge_resnet50 = register('ge_resnet50')
cbam_resnet50 = register('cbam_resnet50')
gc_resnet50 = register('gc_resnet50')
spa_resnet50d = register('spa_resnet50d')
spa_b_resnet50d = register('spa_b_resnet50d')
spa_c_resnet50d = register('spa_c_resnet50d')
spa_resnet101d = register('spa_resnet101d')
spa_b_resnet101d = register('spa_b_resnet101d')
spa_c_resnet101d = register('spa_c_resnet101d')
spa_resnext50_32x4d = register('spa_resnext50_32x4d')
spa_b_resnext50_32x4d = register('spa_b_resnext50_32x4d')
spa_c_resnext50_32x4d = register('spa_c_resnext50_32x4d')
spa_resnext101_32x8d = register('spa_resnext101_32x8d')
spa_b_resnext101_32x8d = register('spa_b_resnext101_32x8d')
spa_c_resnext101_32x8d = register('spa_c_resnext101_32x8d')
spa_wide_resnet50_2 = register('spa_wide_resnet50_2')
spa_b_wide_resnet50_2 = register('spa_b_wide_resnet50_2')
spa_c_wide_resnet50_2 = register('spa_c_wide_resnet50_2')
