"""Counters of parameters and multiply-adds agree with `timm-spa list`, except for documented additions."""
import contextlib
import io
import json
from importlib import resources

import pytest
import timm
import torch
import torch.nn as nn
from networks import NAMES

from timm_spa import SpatialPyramidAttention
from timm_spa.profile import count_cost

LISTED = ('spa_resnet18', 'spa_mobilenetv2', 'spa_densenet_cifar', 'spa_b_preresnet18_cifar', 'spa_c_preresnet18_cifar')
pytestmark = [pytest.mark.slow, pytest.mark.parametrize(
    ('kind', 'name'), [*(('spa', name) for name in LISTED), ('add_attention', 'gated'), ('plain', 'resnet18')])]


@pytest.fixture
def model(kind, name):
    return timm.create_model(name, **NAMES[kind][1] if kind != 'spa' else {}).eval()


@pytest.fixture
def listed(kind, name):
    """Parameters and multiply-adds from models.json, or from `count_cost` for models that it does not list."""
    if kind == 'spa':
        entry = json.loads((resources.files('timm_spa') / 'models.json').read_text())[name]
        return entry['parameters'], entry['macs']
    return count_cost(name, **NAMES[kind][1])[:2]


def size(model):
    return (1, *model.pretrained_cfg['input_size'])


def norms(model):
    """Returns torch's own norm layers. Some counters do not know timm's norm-act layers."""
    return [module for module in model.modules() if type(module) is nn.BatchNorm2d]


def biases(model):
    return sum(m.bias.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None)


@pytest.mark.host('torch, FlopCounterMode', 'torch', catch='counts two per multiply-add')
def test_flop_counter_mode(kind, model, listed):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(size(model)))
    assert counter.get_total_flops() == 2 * listed[1]


@pytest.mark.host(
    'thop', 'thop',
    catch='misses parameters of unknown layer classes: 3 in each SPA gate, and timm\'s norm-act layers; '
          'adds norm and pooling layers')
def test_thop(kind, model, listed):
    import thop

    def nothing(module, inputs, output):
        return None

    with contextlib.redirect_stdout(io.StringIO()):
        macs, parameters = thop.profile(
            model, (torch.zeros(size(model)),), verbose=False,
            custom_ops={module: nothing for module in (nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)})
    assert macs == listed[1]
    weights = [m.pyramid_weight.numel() for m in model.modules() if isinstance(m, SpatialPyramidAttention)]
    others = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and type(m) is not nn.BatchNorm2d]
    missed = sum(weights) + sum(p.numel() for m in others for p in m.parameters(recurse=False))
    assert parameters == listed[0] - missed


@pytest.mark.host('torchinfo', 'torchinfo', catch='adds biases, and one per parameter of torch\'s norm layers')
def test_torchinfo(kind, model, listed):
    import torchinfo

    summary = torchinfo.summary(model, size(model), verbose=0)
    assert summary.total_params == listed[0]
    norm_parameters = sum(p.numel() for module in norms(model) for p in module.parameters())
    assert summary.total_mult_adds == listed[1] + biases(model) + norm_parameters


@pytest.mark.host('fvcore', 'fvcore', catch='adds norm, pooling and upsampling; `by_operator()` separates them')
def test_fvcore(kind, model, listed):
    from fvcore.nn import FlopCountAnalysis, parameter_count

    counts = FlopCountAnalysis(model, torch.zeros(size(model)))
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = counts.by_operator()
    assert by_operator['conv'] + by_operator['linear'] == listed[1]
    assert set(by_operator) <= {'conv', 'linear', 'batch_norm', 'adaptive_avg_pool2d', 'upsample_nearest2d'}
    assert parameter_count(model)[''] == listed[0]


@pytest.mark.host('calflops', 'calflops')
def test_calflops(kind, model, listed):
    from calflops import calculate_flops

    _, macs, parameters = calculate_flops(
        model, input_shape=size(model), print_results=False, print_detailed=False, output_as_string=False)
    assert (parameters, macs) == listed


@pytest.mark.host(
    'ptflops', 'ptflops', catch='adds biases; with `backend=\'pytorch\'` also norm, ReLU and pooling layers')
def test_ptflops(kind, model, listed):
    from ptflops import get_model_complexity_info

    macs, parameters = get_model_complexity_info(
        model, size(model)[1:], as_strings=False, print_per_layer_stat=False, backend='aten')
    assert (parameters, macs - biases(model)) == listed
