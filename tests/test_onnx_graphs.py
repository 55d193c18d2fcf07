"""Graphs of ONNX files, and padding for one size."""
import collections

import onnx
import pytest
import torch
import torch.nn as nn
from test_export import EXACT
from test_one_form import make_model, rel
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame

import timm_spa
from timm_spa.export import export
from timm_spa.export.static_padding import with_static_padding

FORBIDDEN = {'Shape', 'Range', 'Div', 'Mod', 'And', 'Where', 'ScatterND', 'Loop', 'If'}  # arithmetic on sizes


@pytest.mark.parametrize(('name', 'dynamic', 'most'), [
    ('spa_resnet18', None, 130), ('spa_resnet18', 'batch', 130), ('spa_mobilenetv2_050', None, 300),
    ('spa_tf_efficientnet_lite0', None, 250),
    pytest.param('spa_resnet50', None, 280, marks=pytest.mark.slow)])
def test_a_fixed_size_gives_a_small_graph(name, dynamic, most, tmp_path):
    """Averages are constant matrices, and no operator computes with sizes. `export` compares the values."""
    export(make_model(name).float(), tmp_path / 'model.onnx', dynamic=dynamic)
    graph = onnx.load(tmp_path / 'model.onnx').graph
    operators = collections.Counter(node.op_type for node in graph.node)
    assert not FORBIDDEN & set(operators)
    assert len(graph.node) <= most


@torch.no_grad()
def test_equal_constants_are_stored_once(small_net, tmp_path):
    """Gates of one stage have equal matrices as long as their pyramid weights are equal."""
    model = timm_spa.add_attention(small_net, where=['layer1.0', 'layer1.1'], neutral=False)
    path = tmp_path / 'model.onnx'
    assert export(model, path, img_size=64).difference < EXACT
    graph = onnx.load(path).graph
    products = [node for node in graph.node if node.op_type == 'MatMul']
    assert len(products) == 2
    assert products[0].input[1] == products[1].input[1] in {tensor.name for tensor in graph.initializer}
    assert 'Identity' not in {node.op_type for node in graph.node}


@pytest.mark.parametrize('size', [56, 57, 58])
@torch.no_grad()
def test_static_padding(size):
    """Layers that pad like TensorFlow compute the same with amounts for one size, and the model is unchanged."""
    model = nn.Sequential(
        Conv2dSame(3, 8, 3, stride=2), MaxPool2dSame(3, 2), StdConv2dSame(8, 8, 5, stride=2, bias=True),
        AvgPool2dSame(3, 1), ScaledStdConv2dSame(8, 8, (3, 5), stride=1), AvgPool2dSame(2, 2)).eval()
    model[0].bias.add_(10)  # no zeros in the feature maps
    x = torch.randn(2, 3, size, size)
    expected = model(x)
    static = with_static_padding(model, torch.zeros_like(x))
    assert not [m for m in static.modules() if 'Same' in type(m).__name__ and getattr(m, 'same_pad', True)]
    assert rel(static(x), expected) < 1e-6
    assert torch.equal(model(x), expected)
    assert type(model[0]) is Conv2dSame


def test_static_padding_of_a_layer_that_is_called_at_two_sizes():
    conv = Conv2dSame(3, 3, 3, stride=2)
    model = nn.Sequential(conv, conv)
    x = torch.randn(1, 3, 33, 31)
    assert rel(with_static_padding(model, x)(x), model(x)) == 0
