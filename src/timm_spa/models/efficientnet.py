"""MobileNetV2 and EfficientNet-Lite with attention at the end of every block, on timm's EfficientNet.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
  * `EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks` - https://arxiv.org/abs/1905.11946

timm builds MobileNetV2 from its EfficientNet blocks, whose attention slot sits on the expanded channels. The SPA paper
gates the projected channels: after the norm layer of the linear projection, before the residual sum, in all 17 blocks.
The blocks here are timm's with that one step more, and keep the names of timm's parameters. EfficientNet-Lite, which is
MobileNetV2 with other stages, gets its gates in the same place.
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import get_act_layer, get_norm_layer
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_builder import (
    decode_arch_def,
    efficientnet_init_weights,
    resolve_bn_args,
    round_channels,
)
from timm.models.efficientnet import EfficientNet

from ..layers import fuse_branch
from ._base import GatedNet, adopt, divide_reduction
from ._builder import build_model, cifar_cfg, shipped_cfg, warm_cfgs
from ._entrypoints import Family, split_gate

__all__ = ['GatedDepthwiseSeparableConv', 'GatedEfficientNet', 'GatedInvertedResidual']

# expansion, channels, blocks, stride and kernel size of each stage: table 2 of the MobileNetV2 paper
MOBILENETV2_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3))
# table 1 of the EfficientNet paper
EFFICIENTNET_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3))


class GatedDepthwiseSeparableConv(DepthwiseSeparableConv):
    """timm's depthwise-separable block (MobileNetV2's first) with a gate on its projection."""
    gated_parameters = ('bn2.weight', 'bn2.bias')

    def __init__(self, block: DepthwiseSeparableConv, attn: nn.Module):
        """
        Args:
            block: The block as timm's builder made it; its parts are taken over.
            attn: Gate, called with the projected map and the block's input.
        """
        adopt(self, block)
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        block_input = x
        x = self.bn1(self.conv_dw(x))
        x = self.se(self.aa(x))
        x = self.bn2(self.conv_pw(x))
        x = self.attn(x, block_input)
        if self.has_skip:
            x = self.drop_path(x) + block_input
        return x

    def fuse(self) -> nn.Module:
        """Returns the form for inference, see `timm_spa.layers.FusedBranch`."""
        return fuse_branch(
            self, body=[self.conv_dw, self.bn1, self.aa, self.se], last=[self.conv_pw, self.bn2],
            shortcut=() if self.has_skip else None, act=nn.Identity())


class GatedInvertedResidual(InvertedResidual):
    """timm's inverted residual block with a gate on its projection, and optionally a projected shortcut."""
    gated_parameters = ('bn3.weight', 'bn3.bias')
    has_skip: bool

    def __init__(self, block: InvertedResidual, attn: nn.Module, shortcut: Optional[nn.Module] = None):
        """
        Args:
            block: The block as timm's builder made it; its parts are taken over.
            attn: Gate, called with the projected map and the block's input.
            shortcut: Brings the block's input to the shape of its output, for a block that changes the channels and
                still has a residual sum.
        """
        adopt(self, block)
        self.attn = attn
        self.has_skip = self.has_skip or shortcut is not None
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        block_input = x
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        x = self.se(self.aa(x))
        x = self.bn3(self.conv_pwl(x))
        x = self.attn(x, block_input)
        if self.has_skip:
            x = self.drop_path(x) + self.shortcut(block_input)
        return x

    def fuse(self) -> nn.Module:
        """Returns the form for inference, see `timm_spa.layers.FusedBranch`."""
        return fuse_branch(
            self, body=[self.conv_pw, self.bn1, self.conv_dw, self.bn2, self.aa, self.se],
            last=[self.conv_pwl, self.bn3], shortcut=[self.shortcut] if self.has_skip else None, act=nn.Identity())


class GatedEfficientNet(GatedNet, EfficientNet):
    """timm's EfficientNet of depthwise-separable and inverted residual blocks, each with a gate."""

    def __init__(
            self,
            block_args: List[List[Dict[str, Any]]],
            *,
            make_gate: Callable[..., nn.Module],
            cifar: bool = False,
            output_stride: int = 32,
            **kwargs: Any,
    ):
        """
        Args:
            block_args: Stages of block arguments, as timm's `decode_arch_def` makes them.
            make_gate: Makes the gate of a block, see `build_model`.
            cifar: Build the network for 32x32 images: the stem keeps the resolution, and blocks of stride 1 that
                change the channels have a projected shortcut.
            output_stride: Resolution of the input over that of the last feature map, limited by dilation.
            **kwargs: Arguments of timm's EfficientNet.
        """
        block_strides = [[args['stride'] if i == 0 else 1 for i, args in enumerate(stage)] for stage in block_args]
        # timm's builder counts from a stem of stride 2
        super().__init__(block_args, output_stride=output_stride * (2 if cifar else 1), **kwargs)
        if cifar:
            self.conv_stem.stride = (1, 1)
            divide_reduction(self.feature_info, 2, 2)

        dd: Any = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        norm_layer = get_norm_layer(kwargs.get('norm_layer')) or nn.BatchNorm2d
        make_gate = partial(make_gate, norm_layer=norm_layer, **dd)
        stage: Any
        block: Any
        for stage, strides in zip(self.blocks, block_strides, strict=True):
            for i, (block, stride) in enumerate(zip(stage, strides, strict=True)):
                if isinstance(block, InvertedResidual):
                    in_chs, out_chs = block.conv_pw.in_channels, block.conv_pwl.out_channels
                    shortcut = None
                    if cifar and stride == 1 and in_chs != out_chs:
                        shortcut = nn.Sequential(
                            nn.Conv2d(in_chs, out_chs, kernel_size=1, bias=False, **dd), norm_layer(out_chs, **dd))
                    stage[i] = GatedInvertedResidual(block, make_gate(out_chs, in_chs), shortcut)
                else:
                    in_chs, out_chs = block.conv_dw.in_channels, block.conv_pw.out_channels
                    stage[i] = GatedDepthwiseSeparableConv(block, make_gate(out_chs, in_chs))
        self.init_weights()

    def init_convs(self) -> None:
        """Initializes convolutions and linear layers as timm does."""
        efficientnet_init_weights(self)


_BASES: Dict[str, Dict[str, Any]] = {
    'mobilenetv2': dict(),
    'mobilenetv2_050': dict(width=0.5),
    'mobilenetv2_075': dict(width=0.75),
    'mobilenetv2_140': dict(width=1.4),
    'mobilenetv2_cifar': dict(cifar=True, act_layer='relu', pyramid_sizes=(1, 2, 4), rd_ratio=1. / 16),
    'efficientnet_lite0': dict(stages=EFFICIENTNET_STAGES, fix_stem=True),
    'tf_efficientnet_lite0': dict(stages=EFFICIENTNET_STAGES, fix_stem=True, bn_eps=1e-3, pad_type='same'),
}
# what the paper compares with at ImageNet's size has biases (SE) and learned gathering (GE), see table III
_IMAGENET_GATES = {'se': 'se_bias', 'ge': 'ge_conv'}


def _create_efficientnet(
        variant: str,
        pretrained: bool,
        gate: str,
        stages: Sequence[Tuple[int, int, int, int, int]] = MOBILENETV2_STAGES,
        width: float = 1.0,
        cifar: bool = False,
        act_layer: Any = 'relu6',
        norm_layer: Any = None,
        **kwargs: Any,
) -> GatedEfficientNet:
    bn_args = resolve_bn_args(kwargs)
    stages = list(stages)
    if cifar:
        stages[1] = (6, 24, 2, 1, 3)
    arch_def = [
        # timm's block for an expansion of 1 leaves the expanding convolution out, the authors' CIFAR network has it
        [f'ds_r{n}_k{k}_s{s}_c{c}' if t == 1 and not cifar else f'ir_r{n}_k{k}_s{s}_e{t}_c{c}']
        for t, c, n, s, k in stages]
    round_chs_fn = partial(round_channels, multiplier=width)
    model_args = dict(
        block_args=decode_arch_def(arch_def),
        gate=gate if cifar else _IMAGENET_GATES.get(gate, gate),
        pyramid_sizes=(1, 4, 7),
        rd_ratio=1. / 8,
        num_features=max(1280, round_chs_fn(1280)),
        round_chs_fn=round_chs_fn,
        norm_layer=norm_layer or partial(nn.BatchNorm2d, **bn_args),
        act_layer=get_act_layer(act_layer),
        cifar=cifar,
        # timm's default feature extractor for this family is a class of its own, without gates
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3) if cifar else (0, 1, 2, 3, 4)),
    )
    return build_model(GatedEfficientNet, variant, pretrained, **dict(model_args, **kwargs))


def _create(variant: str, pretrained: bool, base: str, **kwargs: Any) -> GatedEfficientNet:
    return _create_efficientnet(variant, pretrained, **dict(_BASES[base], **kwargs))


def _cfgs(name: str) -> Dict[str, Any]:
    if name == 'spa_mobilenetv2_cifar':
        return {f'{name}.tmm_tin200': shipped_cfg(f'{name}.tmm_tin200')}
    if name.endswith('_cifar'):
        return {f'{name}.untrained': cifar_cfg(first_conv='conv_stem', classifier='classifier')}
    base = split_gate(name)[0]
    cfgs = warm_cfgs(name, 'mobilenetv2_100' if base == 'mobilenetv2' else base)
    if name == 'spa_tf_efficientnet_lite0':
        cfgs[f'{name}.grocery81'] = shipped_cfg(f'{name}.grocery81')
    return cfgs


def _describe(base: str) -> str:
    if base == 'mobilenetv2_cifar':
        return 'MobileNetV2 for 32x32 images, tables I and II of the paper,'
    if base.startswith('mobilenetv2'):
        return f'MobileNetV2 of width {_BASES[base].get("width", 1.0)}'
    return 'EfficientNet-Lite0' + (", padded as TensorFlow does," if base.startswith('tf_') else '')


default_cfgs: Dict[str, Any] = {}
register = Family(__name__, _create, _BASES, _describe, _cfgs)

spa_mobilenetv2 = register('spa_mobilenetv2')
spa_mobilenetv2_050 = register('spa_mobilenetv2_050')
spa_mobilenetv2_075 = register('spa_mobilenetv2_075')
spa_mobilenetv2_140 = register('spa_mobilenetv2_140')
spa_b_mobilenetv2 = register('spa_b_mobilenetv2')
spa_c_mobilenetv2 = register('spa_c_mobilenetv2')
se_mobilenetv2 = register('se_mobilenetv2')
ge_mobilenetv2 = register('ge_mobilenetv2')
cbam_mobilenetv2 = register('cbam_mobilenetv2')
mobilenetv2_cifar = register('mobilenetv2_cifar')
spa_mobilenetv2_cifar = register('spa_mobilenetv2_cifar')
spa_b_mobilenetv2_cifar = register('spa_b_mobilenetv2_cifar')
spa_c_mobilenetv2_cifar = register('spa_c_mobilenetv2_cifar')
se_mobilenetv2_cifar = register('se_mobilenetv2_cifar')
ge_mobilenetv2_cifar = register('ge_mobilenetv2_cifar')
spa_efficientnet_lite0 = register('spa_efficientnet_lite0')
spa_b_efficientnet_lite0 = register('spa_b_efficientnet_lite0')
spa_c_efficientnet_lite0 = register('spa_c_efficientnet_lite0')
spa_tf_efficientnet_lite0 = register('spa_tf_efficientnet_lite0')
spa_b_tf_efficientnet_lite0 = register('spa_b_tf_efficientnet_lite0')
spa_c_tf_efficientnet_lite0 = register('spa_c_tf_efficientnet_lite0')
se_tf_efficientnet_lite0 = register('se_tf_efficientnet_lite0')
ge_tf_efficientnet_lite0 = register('ge_tf_efficientnet_lite0')
cbam_tf_efficientnet_lite0 = register('cbam_tf_efficientnet_lite0')
