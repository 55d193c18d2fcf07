"""Counters of parameters and multiply-adds agree with `timm-spa list`, up to what each adds on its own."""
import contextlib
import io
import json
from importlib import resources

import pytest
import timm
import torch
import torch.nn as nn
from nets import NAMES

from timm_spa import SpatialPyramidAttention
from timm_spa.profile import count_cost

LISTED = ('spa_resnet18', 'spa_mobilenetv2', 'spa_densenet_cifar', 'spa_b_preresnet18_cifar', 'spa_c_preresnet18_cifar')
pytestmark = [pytest.mark.slow, pytest.mark.parametrize(
    ('kind', 'name'), [*(('spa', name) for name in LISTED), ('add_attention', 'gated'), ('plain', 'resnet18')])]


@pytest.fixture
def net(kind, name):
    return timm.create_model(name, **NAMES[kind][1] if kind != 'spa' else {}).eval()


@pytest.fixture
def listed(kind, name):
    """Parameters and multiply-adds: from the list, for other nets from what counts them for it."""
    if kind == 'spa':
        about = json.loads((resources.files('timm_spa') / 'models.json').read_text())['models'][name]
        return about['parameters'], about['macs']
    return count_cost(name, **NAMES[kind][1])[:2]


def size(net):
    return (1, *net.pretrained_cfg['input_size'])


def norms(net):
    """The norm layers that are torch's own. timm's layers of norm and activation are unknown to some counters."""
    return [module for module in net.modules() if type(module) is nn.BatchNorm2d]


def biases(net):
    return sum(m.bias.numel() for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None)


@pytest.mark.host('torch, FlopCounterMode', 'torch', catch='two for each multiply-add')
def test_flop_counter_mode(kind, net, listed):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(size(net)))
    assert counter.get_total_flops() == 2 * listed[1]


@pytest.mark.host(
    'thop', 'thop',
    catch='knows layers by their class, and misses the parameters of others: 3 in each SPA gate, and timm\'s layers of '
          'norm and activation; adds norm and pooling layers')
def test_thop(kind, net, listed):
    import thop

    def nothing(module, inputs, output):
        return None

    with contextlib.redirect_stdout(io.StringIO()):
        macs, parameters = thop.profile(
            net, (torch.zeros(size(net)),), verbose=False,
            custom_ops={module: nothing for module in (nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)})
    assert macs == listed[1]
    weights = [m.pyramid_weight.numel() for m in net.modules() if isinstance(m, SpatialPyramidAttention)]
    others = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and type(m) is not nn.BatchNorm2d]
    missed = sum(weights) + sum(p.numel() for m in others for p in m.parameters(recurse=False))
    assert parameters == listed[0] - missed


@pytest.mark.host('torchinfo', 'torchinfo', catch='adds biases, and one for each parameter of torch\'s norm layers')
def test_torchinfo(kind, net, listed):
    import torchinfo

    summary = torchinfo.summary(net, size(net), verbose=0)
    assert summary.total_params == listed[0]
    of_norms = sum(p.numel() for module in norms(net) for p in module.parameters())
    assert summary.total_mult_adds == listed[1] + biases(net) + of_norms


@pytest.mark.host('fvcore', 'fvcore', catch='adds norm, pooling and upsampling, which `by_operator()` tells apart')
def test_fvcore(kind, net, listed):
    from fvcore.nn import FlopCountAnalysis, parameter_count

    counts = FlopCountAnalysis(net, torch.zeros(size(net)))
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = counts.by_operator()
    assert by_operator['conv'] + by_operator['linear'] == listed[1]
    assert set(by_operator) <= {'conv', 'linear', 'batch_norm', 'adaptive_avg_pool2d', 'upsample_nearest2d'}
    assert parameter_count(net)[''] == listed[0]


@pytest.mark.host('calflops', 'calflops')
def test_calflops(kind, net, listed):
    from calflops import calculate_flops

    _, macs, parameters = calculate_flops(
        net, input_shape=size(net), print_results=False, print_detailed=False, output_as_string=False)
    assert (parameters, macs) == listed


@pytest.mark.host(
    'ptflops', 'ptflops', catch='adds biases; with `backend=\'pytorch\'` also norm, ReLU and pooling layers')
def test_ptflops(kind, net, listed):
    from ptflops import get_model_complexity_info

    macs, parameters = get_model_complexity_info(
        net, size(net)[1:], as_strings=False, print_per_layer_stat=False, backend='aten')
    assert (parameters, macs - biases(net)) == listed
