"""Exported graphs consist of operators that every converter reads alike."""
import warnings

import pytest
import torch
from marks import slow_unless
from test_one_form import make_model, rel
from timm.utils import reparameterize_model

import timm_spa

# 192: stages of 6x6 feature maps, whose sides the sizes of the pyramid do not divide
CASES = [
    ('spa_resnet18', 'fused', 224), ('spa_resnet18', 'built', 192), ('spa_b_resnet18', 'fused', 192),
    ('spa_c_resnet18', 'built', 224), ('spa_mobilenetv2_050', 'fused', 192),
    ('spa_tf_efficientnet_lite0', 'fused', 224),
    ('spa_densenet121', 'fused', 192), ('spa_mobilenetv4_conv_small', 'built', 224),
    ('se_tf_efficientnet_lite0', 'fused', 192), ('ge_tf_efficientnet_lite0', 'fused', 192),
    *((gate, 'attached', 192) for gate in ('spa', 'se', 'ge', 'cbam'))]


def build(name, form):
    """A model with random norm statistics; gates of the form 'attached' come from `add_attention`."""
    if form == 'attached':
        model = make_model('resnet18')
        model = timm_spa.add_attention(model, gate=name, where=['layer1.0', 'layer3.1', 'layer4.1'], neutral=False)
    else:
        model = make_model(name)
    return reparameterize_model(model) if form == 'fused' else model


def sides(node):
    return tuple(node.meta['val'].shape[2:])


def forbidden(program, fixed=True):
    """Operators that some converter refuses, or computes in its own way."""
    wrong = []
    for node in program.graph.nodes:
        if node.op != 'call_function':
            continue
        name = str(node.target)
        is_wrong = any(part in name for part in ('addcmul', '__and__', 'bitwise_and'))
        if fixed and ('upsample' in name or 'interpolate' in name):
            is_wrong = any(length % size for size, length in zip(sides(node.args[0]), sides(node), strict=True))
        elif fixed and 'adaptive' in name and 'pool' in name:
            output = node.meta['val'][0] if isinstance(node.meta['val'], tuple) else node.meta['val']
            is_wrong = tuple(output.shape[2:]) != (1, 1)
        elif fixed and 'floor_divide' in name:
            is_wrong = True
        if is_wrong:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(('name', 'form', 'size'), slow_unless(
    lambda name: name in ('spa_b_resnet18', 'spa'), CASES))
@torch.no_grad()
def test_torch_export_at_a_fixed_size(name, form, size):
    """Other people's converters begin with this graph, some of them decompose it."""
    model, x = build(name, form), torch.randn(1, 3, size, size)
    program = torch.export.export(model, (x,))
    assert not forbidden(program)
    assert not forbidden(program.run_decompositions({}))
    assert rel(program.module()(x), model(x)) < 1e-5


@pytest.mark.parametrize(('name', 'form'), slow_unless(
    lambda name: name == 'spa', [
        ('spa_resnet18', 'fused'), ('spa_b_resnet18', 'fused'), ('spa_tf_efficientnet_lite0', 'fused'),
        ('spa', 'attached')]))
@torch.no_grad()
def test_free_sizes_and_traces(name, form):
    """The graphs keep symbolic sizes, but have none of the operators that converters refuse."""
    model, x = build(name, form), torch.randn(2, 3, 96, 128)
    free = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    assert not forbidden(torch.export.export(model, (x,), dynamic_shapes=(free,)), fixed=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, x, check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not {'aten::addcmul', 'aten::__and__', 'aten::bitwise_and'} & kinds
