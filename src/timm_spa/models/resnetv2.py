"""Pre-activation ResNet for 32x32 images, with and without attention at the end of every residual branch.

Papers:
  * `Spatial Pyramid Attention for Deep Convolutional Neural Networks` - https://doi.org/10.1109/TMM.2021.3068576
  * `Identity Mappings in Deep Residual Networks` - https://arxiv.org/abs/1603.05027

The networks of the paper's tables II and IV, as its authors' code has them: the gate acts on the last convolution's raw
output; variants B and C (and SE+, SE++) read the block's raw input, before its first norm layer; the projection of the
shortcut reads that norm layer's activated output; no norm layer stands before the final pooling.

All else is timm's ResNet. `feature_info` gives the reduction against the image: 1 for the stem and the first stage,
then 2, 4 and 8. The blocks have no fused form for inference: their norm layers come before the convolutions.
"""
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn

from ._base import divide_reduction
from ._builder import build_model, cifar_cfg
from ._entrypoints import Family
from .resnet import GatedResNet

__all__ = ['GatedPreActBasicBlock', 'GatedPreActBottleneck', 'GatedPreActResNet']


class _GatedPreActBlock(nn.Module):
    """norm - act - conv, two or three times, then a gate and the residual sum. Takes the arguments of timm's blocks."""
    # channels over `planes` and kernel size of each convolution, and whether it is the one with the stride
    convolutions: Tuple[Tuple[int, int, bool], ...]
    if TYPE_CHECKING:  # the layers are made in a loop
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
            self,
            inplanes: int,
            planes: int,
            stride: int = 1,
            downsample: Optional[nn.Sequential] = None,
            dilation: int = 1,
            first_dilation: Optional[int] = None,
            act_layer: Any = nn.ReLU,
            norm_layer: Any = nn.BatchNorm2d,
            drop_path: Optional[nn.Module] = None,
            device=None,
            dtype=None,
            *,
            make_gate: Callable[..., nn.Module],
            **kwargs: Any,
    ):
        """
        Args:
            inplanes: Channels of the input.
            planes: Channels of the branch, those of the output over `expansion`.
            stride: Stride of the first 3x3 convolution.
            downsample: timm's projection of the shortcut; its convolution is used.
            dilation: Dilation of a second 3x3 convolution.
            first_dilation: Dilation of the first; `dilation` if None.
            act_layer: Activation.
            norm_layer: Norm layer.
            drop_path: Stochastic depth of the branch.
            make_gate: Makes the gate, see `build_model`.
            **kwargs: Arguments of timm's blocks that have no counterpart here, at their defaults.

        Raises:
            ValueError: An argument without counterpart is not at its default, or the projection begins with a pooling.
        """
        nothing = dict(cardinality=1, base_width=64, reduce_first=1, aa_layer=None, drop_block=None)
        for name, value in kwargs.items():
            if name not in nothing or value != nothing[name]:
                raise ValueError(f'The pre-activation blocks do not support {name}, got {value!r}.')
        if downsample is not None and not isinstance(downsample[0], nn.Conv2d):
            raise ValueError('The pre-activation blocks do not support avg_down: their projection is one convolution.')
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__()
        channels = inplanes
        for i, (factor, kernel_size, first) in enumerate(self.convolutions, start=1):
            conv_stride = stride if first else 1
            conv_dilation = 1 if kernel_size == 1 else (first_dilation or dilation) if first else dilation
            self.add_module(f'bn{i}', norm_layer(channels, **dd))
            self.add_module(f'act{i}', act_layer(inplace=True))
            self.add_module(f'conv{i}', nn.Conv2d(
                channels, planes * factor, kernel_size, stride=conv_stride, padding=conv_dilation * (kernel_size // 2),
                dilation=conv_dilation, bias=False, **dd))
            channels = planes * factor
        self.attn = make_gate(channels, inplanes, norm_layer=norm_layer, **dd)
        self.downsample = None if downsample is None else downsample[0]
        self.drop_path = nn.Identity() if drop_path is None else drop_path


class GatedPreActBasicBlock(_GatedPreActBlock):
    """Two convolutions of 3x3."""
    expansion = 1
    convolutions = ((1, 3, True), (1, 3, False))
    gated_parameters = ('conv2.weight',)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inplanes, H, W) to (N, planes, H / stride, W / stride)."""
        out = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.act2(self.bn2(out)))
        return self.drop_path(self.attn(out, x)) + shortcut


class GatedPreActBottleneck(_GatedPreActBlock):
    """Convolutions of 1x1, 3x3 and 1x1."""
    expansion = 4
    convolutions = ((1, 1, False), (1, 3, True), (4, 1, False))
    gated_parameters = ('conv3.weight',)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (N, inplanes, H, W) to (N, planes * 4, H / stride, W / stride)."""
        out = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.act2(self.bn2(out)))
        out = self.conv3(self.act3(self.bn3(out)))
        return self.drop_path(self.attn(out, x)) + shortcut


class GatedPreActResNet(GatedResNet):
    """Pre-activation ResNet on a stem of one 3x3 convolution that keeps the resolution."""

    def __init__(self, *args: Any, in_chans: int = 3, output_stride: int = 8, **kwargs: Any):
        """
        Args:
            *args: Positional arguments of timm's ResNet.
            in_chans: Channels of the images.
            output_stride: Resolution of the input over that of the last feature map: 8, 4 or 2, limited by dilation.
            **kwargs: Arguments of `GatedResNet`.

        Raises:
            ValueError: `output_stride` is another number.
        """
        if output_stride not in (2, 4, 8):
            raise ValueError(f'output_stride must be 2, 4 or 8, got {output_stride}.')
        super().__init__(*args, in_chans=in_chans, output_stride=output_stride * 4, **kwargs)
        self.conv1: nn.Module = nn.Conv2d(
            in_chans, self.feature_info[0]['num_chs'], 3, padding=1, bias=False, device=kwargs.get('device'),
            dtype=kwargs.get('dtype'))
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.bn1 = nn.Identity()
        self.act1 = nn.Identity()
        self.maxpool = nn.Identity()
        divide_reduction(self.feature_info, 2, 4)


_DEPTHS: Dict[str, Any] = {
    'preresnet18_cifar': (GatedPreActBasicBlock, (2, 2, 2, 2)),
    'preresnet34_cifar': (GatedPreActBasicBlock, (3, 4, 6, 3)),
    'preresnet50_cifar': (GatedPreActBottleneck, (3, 4, 6, 3)),
    'preresnet101_cifar': (GatedPreActBottleneck, (3, 4, 23, 3)),
    'preresnet152_cifar': (GatedPreActBottleneck, (3, 8, 36, 3)),
}


def _create_preact_resnet(variant: str, pretrained: bool, base: str, **kwargs: Any) -> GatedPreActResNet:
    block, layers = _DEPTHS[base]
    model_args = dict(block=block, layers=layers, pyramid_sizes=(1, 2, 4), rd_ratio=1. / 16)
    return build_model(GatedPreActResNet, variant, pretrained, **dict(model_args, **kwargs))


def _cfgs(name: str) -> Dict[str, Any]:
    return {f'{name}.untrained': cifar_cfg(first_conv='conv1', classifier='fc')}


def _describe(base: str) -> str:
    return f'Pre-activation ResNet-{base[len("preresnet"):-len("_cifar")]} for 32x32 images'


default_cfgs: Dict[str, Any] = {}
register = Family(__name__, _create_preact_resnet, _DEPTHS, _describe, _cfgs)

preresnet18_cifar = register('preresnet18_cifar')
preresnet34_cifar = register('preresnet34_cifar')
preresnet50_cifar = register('preresnet50_cifar')
preresnet101_cifar = register('preresnet101_cifar')
preresnet152_cifar = register('preresnet152_cifar')
spa_preresnet18_cifar = register('spa_preresnet18_cifar')
spa_preresnet34_cifar = register('spa_preresnet34_cifar')
spa_preresnet50_cifar = register('spa_preresnet50_cifar')
spa_preresnet101_cifar = register('spa_preresnet101_cifar')
spa_preresnet152_cifar = register('spa_preresnet152_cifar')
spa_b_preresnet18_cifar = register('spa_b_preresnet18_cifar')
spa_b_preresnet34_cifar = register('spa_b_preresnet34_cifar')
spa_b_preresnet50_cifar = register('spa_b_preresnet50_cifar')
spa_b_preresnet101_cifar = register('spa_b_preresnet101_cifar')
spa_b_preresnet152_cifar = register('spa_b_preresnet152_cifar')
spa_c_preresnet18_cifar = register('spa_c_preresnet18_cifar')
spa_c_preresnet34_cifar = register('spa_c_preresnet34_cifar')
spa_c_preresnet50_cifar = register('spa_c_preresnet50_cifar')
spa_c_preresnet101_cifar = register('spa_c_preresnet101_cifar')
spa_c_preresnet152_cifar = register('spa_c_preresnet152_cifar')
se_preresnet18_cifar = register('se_preresnet18_cifar')
se_preresnet34_cifar = register('se_preresnet34_cifar')
se_preresnet50_cifar = register('se_preresnet50_cifar')
se_preresnet101_cifar = register('se_preresnet101_cifar')
se_preresnet152_cifar = register('se_preresnet152_cifar')
ge_preresnet18_cifar = register('ge_preresnet18_cifar')
ge_preresnet34_cifar = register('ge_preresnet34_cifar')
ge_preresnet50_cifar = register('ge_preresnet50_cifar')
ge_preresnet101_cifar = register('ge_preresnet101_cifar')
ge_preresnet152_cifar = register('ge_preresnet152_cifar')
# the connection study of table IV
se_b_preresnet18_cifar = register('se_b_preresnet18_cifar')
se_b_preresnet50_cifar = register('se_b_preresnet50_cifar')
se_b_preresnet101_cifar = register('se_b_preresnet101_cifar')
se_c_preresnet18_cifar = register('se_c_preresnet18_cifar')
se_c_preresnet50_cifar = register('se_c_preresnet50_cifar')
se_c_preresnet101_cifar = register('se_c_preresnet101_cifar')
