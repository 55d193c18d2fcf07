"""Constant amounts of TensorFlow's 'same' padding, for files with a fixed image size."""
import copy
from typing import Any, Dict, List, Set, Tuple

import torch
import torch.nn as nn
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same_arg
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame

__all__ = ['with_static_padding']

CONVS = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)
POOLS = (AvgPool2dSame, MaxPool2dSame)


def with_static_padding(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Returns a copy of a model whose 'same' padding holds for the size of the example only.

    timm computes the amounts in every forward, and the legacy exporters turn that into dozens of nodes per layer.
    """
    model = copy.deepcopy(model)
    sizes: Dict[nn.Module, Set[Tuple[int, ...]]] = {}

    def record(layer: nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
        sizes.setdefault(layer, set()).add(tuple(inputs[0].shape[2:]))

    layers = [m for m in model.modules() if type(m) in POOLS or type(m) in CONVS and getattr(m, 'same_pad', True)]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    if layers:
        model(example)
    for handle in handles:
        handle.remove()
    static = {layer: _static_layer(layer, *sizes[layer]) for layer in layers if len(sizes.get(layer, ())) == 1}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in static:
                setattr(parent, name, static[child])
    return static.get(model, model)


def _static_layer(layer: Any, size: Tuple[int, ...]) -> nn.Module:
    """Returns a layer for inputs of the given height and width."""
    kernel, stride, dilation = ([n, n] if isinstance(n, int) else list(n) for n in (
        layer.kernel_size, layer.stride, getattr(layer, 'dilation', 1)))
    # timm's average pooling has no dilation
    left, right, top, bottom = pads = pad_same_arg(list(size), kernel, stride, dilation)
    symmetric = left == right and top == bottom and not getattr(layer, 'ceil_mode', False)
    plain = _without_same_padding(layer, [top, left] if symmetric else [0, 0])
    if symmetric:
        return plain
    return nn.Sequential(nn.ConstantPad2d(pads, -float('inf') if isinstance(layer, nn.MaxPool2d) else 0.), plain)


def _without_same_padding(layer: Any, padding: List[int]) -> nn.Module:
    """Returns a layer with the same parameters and an explicit padding."""
    height_width = (padding[0], padding[1])
    if isinstance(layer, nn.MaxPool2d):
        return nn.MaxPool2d(layer.kernel_size, layer.stride, height_width, layer.dilation, ceil_mode=layer.ceil_mode)
    if isinstance(layer, nn.AvgPool2d):  # averages include the padding
        return nn.AvgPool2d(layer.kernel_size, layer.stride, height_width, layer.ceil_mode, count_include_pad=True)
    if not isinstance(layer, Conv2dSame):
        layer.same_pad, layer.padding = False, height_width
        return layer
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, height_width, layer.dilation,
        layer.groups, device='meta')
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv.train(layer.training)
