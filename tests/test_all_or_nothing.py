"""`add_attention` changes a model as a whole or not at all."""
import pytest
import timm
import torch
from test_add_attention import IMAGES, KINDS, random_net, relative
from timm.layers import GroupNorm1, LayerNorm2d
from torch.nn.utils import prune

import timm_spa


def changed(change, name='layer2.0.bn2', model='resnet18'):
    def create():
        net = timm.create_model(model)
        change(net.get_submodule(name))
        return net

    return create


COMPUTED = [
    (changed(lambda m: prune.l1_unstructured(m, 'weight', 0.5)), {},
     'layer2.0.bn2 cannot be gated: its weight is computed.*torch.nn.utils.prune.remove on it first'),
    (changed(lambda m: prune.l1_unstructured(m, 'bias', 0.5), 'layer4.1.bn2'), {}, 'layer4.1.bn2 .*its bias .*prune'),
    (changed(lambda m: prune.l1_unstructured(m, 'weight', 0.5), 'layer2.0.conv2'), dict(where='layer*.conv2'),
     'layer2.0.conv2 cannot be gated: its weight'),
    (changed(torch.nn.utils.weight_norm, 'layer2.0.conv2'), dict(where='layer*.conv2'), 'utils.remove_weight_norm'),
    (changed(torch.nn.utils.spectral_norm, 'layer2.0.conv2'), dict(where='layer*.conv2'), 'utils.remove_spectral_norm'),
    (changed(torch.nn.utils.parametrizations.weight_norm, 'layer2.0.conv2'), dict(where='layer*.conv2'),
     'layer2.0.conv2 cannot be gated: .*parametrize.remove_parametrizations'),
    (changed(lambda m: prune.l1_unstructured(m, 'weight', 0.5), 'stages.2.blocks.5.conv_dw', 'convnext_atto'), {},
     'stages.2.blocks.5.conv_dw cannot be gated'),
    (changed(lambda m: prune.l1_unstructured(m, 'bias', 0.5), 'stages.1.0.conv_1x1.bn', 'repvgg_a0'), {},
     'stages.1.0 cannot be gated: its conv_1x1.bn.bias'),
    (changed(lambda m: prune.l1_unstructured(m, 'weight', 0.5), 'blocks.1.0.ghost2.cheap_operation.0', 'ghostnet_100'),
     {}, 'blocks.1.0.ghost2 cannot be gated: its cheap_operation.0.weight'),
]


@pytest.mark.parametrize('neutral', [True, False])
@pytest.mark.parametrize(('model', 'kwargs', 'message'), COMPUTED)
def test_layers_whose_weights_are_computed_are_refused(model, kwargs, message, neutral):
    model = model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        timm_spa.add_attention(model, **kwargs, neutral=neutral)
    assert_same(snapshot(model), before)
    model(IMAGES)


def test_after_the_remedy():
    model = random_net('resnet18')
    for block in (model.layer1[0], model.layer2[1]):
        prune.l1_unstructured(block.conv1, 'weight', 0.5)  # is not gated
    prune.l1_unstructured(model.layer1[0].bn2, 'weight', 0.5)
    prune.remove(model.layer1[0].bn2, 'weight')
    expected = model(IMAGES)
    assert torch.equal(timm_spa.add_attention(model)(IMAGES), expected)


def snapshot(model):
    return ([(name, module, dict(module.__dict__), dict(module._modules)) for name, module in model.named_modules()],
            {key: value.clone() for key, value in model.state_dict().items()})


def assert_same(now, before):
    assert [entry[:2] for entry in now[0]] == [entry[:2] for entry in before[0]]
    for (name, _, *attributes), (_, _, *expected) in zip(now[0], before[0], strict=True):
        assert [list(a) for a in attributes] == [list(a) for a in expected], name
        assert all(a[key] is e[key] for a, e in zip(attributes, expected, strict=True) for key in e), name
    assert now[1].keys() == before[1].keys()
    assert all(torch.equal(value, before[1][key]) for key, value in now[1].items())


@pytest.mark.parametrize('name', KINDS)
def test_a_failure_on_the_way_leaves_the_model_unchanged(name, monkeypatch):
    """One that none of the checks foresees: late, when gates are attached and the first tensors are doubled."""
    model = random_net(name)
    before = snapshot(model)
    factors = timm_spa.models.gated.__globals__['neutral_factors']

    def unknown_tensor(model, gates):
        known = factors(model, gates)
        keys = list(known)
        return {**{key: known[key] for key in keys[:len(keys) // 2]}, 'unknown': 2.}

    monkeypatch.setitem(timm_spa.models.gated.__globals__, 'neutral_factors', unknown_tensor)
    with pytest.raises(KeyError, match='unknown'):
        timm_spa.add_attention(model)
    monkeypatch.undo()
    assert_same(snapshot(model), before)
    with torch.no_grad():
        expected = model(IMAGES)
        assert relative(timm_spa.add_attention(model)(IMAGES), expected) <= 1e-6


def test_the_last_gate_that_can_not_be_made_leaves_the_model_unchanged():
    model = timm.create_model('resnet18', norm_layer=LayerNorm2d)
    model.layer4[1].bn2 = GroupNorm1(512)
    before = snapshot(model)
    with pytest.raises(ValueError, match='cannot learn'):
        timm_spa.add_attention(model, pyramid_sizes=(1,), rd_ratio=1 / 128)
    assert_same(snapshot(model), before)
