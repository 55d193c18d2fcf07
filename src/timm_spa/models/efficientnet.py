"""MobileNetV2 with attention at the end of every block, on timm's EfficientNet.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381

timm builds MobileNetV2 from its EfficientNet blocks, whose attention slot sits on the expanded channels. The SPA paper
gates the projected channels: after the norm layer of the linear projection, before the residual sum, in all 17 blocks.
The blocks here are timm's with that one step more, and keep the names of timm's parameters.
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from timm.layers import get_act_layer
from timm.models import generate_default_cfgs
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_builder import (
    decode_arch_def,
    efficientnet_init_weights,
    resolve_bn_args,
    round_channels,
)
from timm.models.efficientnet import EfficientNet

from ..layers import create_gate, gated_residual, saves_passes
from ._entrypoints import register_gated
from ._pretrained import build_model, cifar_cfg, reset_parameters, shipped_cfg, untrained_cfg, warm_cfg

__all__ = ['GatedDepthwiseSeparableConv', 'GatedEfficientNet', 'GatedInvertedResidual']

# expansion, channels, blocks, stride of each stage: table 2 of the MobileNetV2 paper
MOBILENETV2_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class GatedDepthwiseSeparableConv(DepthwiseSeparableConv):
    """timm's depthwise-separable block (MobileNetV2's first) with a gate on its projection."""
    gated_parameters = ('bn2.weight', 'bn2.bias')

    def __init__(self, block: DepthwiseSeparableConv, attn: nn.Module):
        """
        Args:
            block: The block as timm's builder made it; its parts are taken over.
            attn: Gate, called with the projected map and the block's input.
        """
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        block_input = x
        x = self.bn1(self.conv_dw(x))
        x = self.se(self.aa(x))
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles what stands after an `and`
            if saves_passes(self.attn, self.conv_pw, self.bn2, self.drop_path, x):
                shortcut = block_input if self.has_skip else None
                return gated_residual(self.attn, self.conv_pw, self.bn2, x, block_input, shortcut)

        x = self.bn2(self.conv_pw(x))
        x = self.attn(x, block_input)
        if self.has_skip:
            x = self.drop_path(x) + block_input
        return x


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
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)
        self.attn = attn
        self.has_skip = self.has_skip or shortcut is not None
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, C', H, W) to (N, C, H / stride, W / stride)."""
        block_input = x
        x = self.bn1(self.conv_pw(x))
        x = self.bn2(self.conv_dw(x))
        x = self.se(self.aa(x))
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles what stands after an `and`
            if saves_passes(self.attn, self.conv_pwl, self.bn3, self.drop_path, x):
                shortcut = self.shortcut(block_input) if self.has_skip else None
                return gated_residual(self.attn, self.conv_pwl, self.bn3, x, block_input, shortcut)

        x = self.bn3(self.conv_pwl(x))
        x = self.attn(x, block_input)
        if self.has_skip:
            x = self.drop_path(x) + self.shortcut(block_input)
        return x


class GatedEfficientNet(EfficientNet):
    """timm's EfficientNet of depthwise-separable and inverted residual blocks, each with a gate."""

    def __init__(
            self,
            block_args: List[List[Dict[str, Any]]],
            gate: str = 'spa',
            pyramid_sizes: Sequence[int] = (1, 4, 7),
            rd_ratio: float = 1. / 8,
            cifar: bool = False,
            output_stride: int = 32,
            **kwargs: Any,
    ):
        """
        Args:
            block_args: Stages of block arguments, as timm's `decode_arch_def` makes them.
            gate: Name of the gate, see `timm_spa.layers.create_gate`.
            pyramid_sizes: Side lengths of the gate's pooled maps, in cells.
            rd_ratio: Reduced width of the gates over their channels.
            cifar: The shape of net for 32x32 images: the stem keeps the resolution, and blocks of stride 1 that change
                the channels have a projected shortcut.
            output_stride: Resolution of the input over that of the last feature map, limited by dilation.
            **kwargs: Arguments of timm's EfficientNet.
        """
        block_strides = [[args['stride'] if i == 0 else 1 for i, args in enumerate(stage)] for stage in block_args]
        # timm's builder counts from a stem of stride 2
        super().__init__(block_args, output_stride=output_stride * (2 if cifar else 1), **kwargs)
        if cifar:
            self.conv_stem.stride = (1, 1)
            for info in self.feature_info:
                info['reduction'] //= 2

        dd: Any = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        norm_layer = kwargs.get('norm_layer') or nn.BatchNorm2d
        make_gate = partial(
            create_gate, gate, pyramid_sizes=pyramid_sizes, rd_ratio=rd_ratio, norm_layer=norm_layer, **dd)
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
                    stage[i] = GatedInvertedResidual(block, make_gate(channels=out_chs, in_channels=in_chs), shortcut)
                else:
                    in_chs, out_chs = block.conv_dw.in_channels, block.conv_pw.out_channels
                    stage[i] = GatedDepthwiseSeparableConv(block, make_gate(channels=out_chs, in_channels=in_chs))
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initializes every parameter and buffer, also of a model made on the meta device and moved by `to_empty`."""
        reset_parameters(self)
        efficientnet_init_weights(self)


_WIDTHS = {
    'mobilenetv2': 1.0,
    'mobilenetv2_050': 0.5,
    'mobilenetv2_075': 0.75,
    'mobilenetv2_140': 1.4,
    'mobilenetv2_cifar': 1.0,
}
# what the paper compares with at ImageNet's size has biases (SE) and learned gathering (GE), see table III
_IMAGENET_GATES = {'se': 'se_bias', 'ge': 'ge_conv'}


def _create_mobilenetv2(variant: str, pretrained: bool, base: str, gate: str, **kwargs: Any) -> GatedEfficientNet:
    cifar = base == 'mobilenetv2_cifar'
    stages = list(MOBILENETV2_STAGES)
    if cifar:
        stages[1] = (6, 24, 2, 1)
    arch_def = [
        # timm's block for an expansion of 1 leaves the expanding convolution out, the authors' CIFAR net has it
        [f'ds_r{n}_k3_s{s}_c{c}' if t == 1 and not cifar else f'ir_r{n}_k3_s{s}_e{t}_c{c}'] for t, c, n, s in stages]
    round_chs_fn = partial(round_channels, multiplier=_WIDTHS[base])
    model_args = dict(
        block_args=decode_arch_def(arch_def),
        gate=gate if cifar else _IMAGENET_GATES.get(gate, gate),
        pyramid_sizes=(1, 2, 4) if cifar else (1, 4, 7),
        rd_ratio=1. / 16 if cifar else 1. / 8,
        num_features=max(1280, round_chs_fn(1280)),
        round_chs_fn=round_chs_fn,
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=get_act_layer(kwargs.pop('act_layer', 'relu' if cifar else 'relu6')),
        cifar=cifar,
        # timm's default feature extractor for this family is a class of its own, without gates
        feature_cfg=dict(feature_cls='getter', out_indices=(0, 1, 2, 3) if cifar else (0, 1, 2, 3, 4)),
    )
    return build_model(GatedEfficientNet, variant, pretrained, **dict(model_args, **kwargs))


NAMES = (
    'spa_mobilenetv2', 'spa_mobilenetv2_050', 'spa_mobilenetv2_075', 'spa_mobilenetv2_140',
    'spa_b_mobilenetv2', 'spa_c_mobilenetv2', 'se_mobilenetv2', 'ge_mobilenetv2', 'cbam_mobilenetv2',
    'mobilenetv2_cifar', 'spa_mobilenetv2_cifar', 'spa_b_mobilenetv2_cifar', 'spa_c_mobilenetv2_cifar',
    'se_mobilenetv2_cifar', 'ge_mobilenetv2_cifar',
)

_cifar_cfg = partial(cifar_cfg, first_conv='conv_stem', classifier='classifier')

default_cfgs = generate_default_cfgs({
    'spa_mobilenetv2.warm_ra_in1k': warm_cfg('mobilenetv2_100.ra_in1k'),
    'spa_mobilenetv2_050.warm_lamb_in1k': warm_cfg('mobilenetv2_050.lamb_in1k'),
    'spa_mobilenetv2_075.untrained': untrained_cfg('mobilenetv2_075.untrained'),
    'spa_mobilenetv2_140.warm_ra_in1k': warm_cfg('mobilenetv2_140.ra_in1k'),
    'spa_b_mobilenetv2.warm_ra_in1k': warm_cfg('mobilenetv2_100.ra_in1k'),
    'spa_c_mobilenetv2.warm_ra_in1k': warm_cfg('mobilenetv2_100.ra_in1k'),
    'se_mobilenetv2.untrained': untrained_cfg('mobilenetv2_100.ra_in1k'),
    'ge_mobilenetv2.untrained': untrained_cfg('mobilenetv2_100.ra_in1k'),
    'cbam_mobilenetv2.untrained': untrained_cfg('mobilenetv2_100.ra_in1k'),
    'mobilenetv2_cifar.untrained': _cifar_cfg(),
    'spa_mobilenetv2_cifar.tmm_tin200': shipped_cfg('spa_mobilenetv2_cifar.tmm_tin200'),
    'spa_b_mobilenetv2_cifar.untrained': _cifar_cfg(),
    'spa_c_mobilenetv2_cifar.untrained': _cifar_cfg(),
    'se_mobilenetv2_cifar.untrained': _cifar_cfg(),
    'ge_mobilenetv2_cifar.untrained': _cifar_cfg(),
})


def _describe(base: str) -> str:
    if base == 'mobilenetv2_cifar':
        return 'MobileNetV2 for 32x32 images, tables I and II of the paper,'
    return f'MobileNetV2 of width {_WIDTHS[base]}'


register_gated(globals(), NAMES, _create_mobilenetv2, _describe)
