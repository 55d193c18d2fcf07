"""A model computes in one way: with a gradient and without, listened to, traced, quantized and exported."""
import copy
import warnings

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from marks import slow_unless
from test_models import ALSO_SLOW, DEEP, KINDS, MODELS, image_size
from timm.models import FeatureListNet
from torch.utils.flop_counter import FlopCounterMode

import timm_spa
from timm_spa.layers import NoGate

MODES = dict(grad=torch.enable_grad, no_grad=torch.no_grad, inference=torch.inference_mode)


def make_model(name, **kwargs):
    """A model for inference whose norm layers and gates do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.dtype.is_floating_point and value.ndim == 1:
                value.uniform_(0.8, 1.2) if 'var' in key or 'weight' in key else value.uniform_(-0.1, 0.1)
        for block in model.modules():
            if hasattr(block, 'zero_init_last'):  # or a deep net would round further than any useful tolerance
                (block.bn3 if hasattr(block, 'bn3') else block.bn2).weight.uniform_(0.2, 0.4)
    return model


def images_of(name, batch=2):
    """Images as small as still give maps, in most stages, whose sides the pyramid's largest size divides."""
    return torch.randn(batch, 3, *((112, 56) if image_size(name) == (224, 224) else image_size(name)))


def gates(model):
    return {name: m.attn for name, m in model.named_modules() if hasattr(m, 'attn') and not isinstance(m.attn, NoGate)}


def rel(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def record(model, images):
    """Output, names of the modules in the order of their calls, and multiply-adds."""
    names = {module: name for name, module in model.named_modules()}
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: called.append(names.get(m)))
    try:
        with FlopCounterMode(display=False) as counter:
            output = model(images)
    finally:
        handle.remove()
    return output, called, counter.get_total_flops()


# the gates to compare with are modules of their own, with nothing that could tell modes apart
@pytest.mark.quick(12)
@pytest.mark.parametrize(('name', 'memory_format'), slow_unless(
    lambda name: name in KINDS or 'spa' in name and not any(part in name for part in (*DEEP, '50', 'vgg16_bn')),
    [*((name, torch.contiguous_format) for name in MODELS), *((name, torch.channels_last) for name in KINDS)]))
def test_same_in_every_mode(name, memory_format):
    """The same bits by the same modules at the same cost, which also grows with the batch and nothing else."""
    model = make_model(name).to(memory_format=memory_format)
    images = images_of(name).to(memory_format=memory_format)
    recorded = {}
    for mode, context in MODES.items():
        with context():
            recorded[mode] = record(model, images)
    output, called, flops = recorded['grad']
    leaves = {n for n, m in model.named_modules() if not list(m.children()) and not isinstance(m, nn.Identity)}
    assert leaves <= set(called)
    for other_output, other_called, other_flops in recorded.values():
        assert torch.equal(other_output, output)
        assert other_called == called
        assert other_flops == flops
    assert record(model, torch.cat([images, images]))[1:] == (called, 2 * flops)


@pytest.mark.quick(12)
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('mode', MODES)
def test_maps_that_somebody_keeps(name, mode):
    """A gate writes to none of its inputs, and the same layers' outputs are overwritten in every mode."""
    model, images, kept = make_model(name), images_of(name), {}
    for key, module in model.named_modules():
        module.register_forward_hook(
            lambda m, args, out, key=key: kept.setdefault(key, (out, out.detach().clone())) and None)
    ratios = []
    for gate in gates(model).values():
        nn.init.zeros_(gate.fc2.weight)
        gate.register_forward_pre_hook(lambda m, args: setattr(m, 'seen', [a.detach().clone() for a in args]))
        gate.register_forward_hook(lambda m, args, out: ratios.append(
            all(torch.equal(a, b) for a, b in zip(args, m.seen, strict=True)) and torch.equal(out, args[0] / 2)
            and out.data_ptr() != args[0].data_ptr()))
    overwritten = {}
    for other in {mode, 'grad'}:
        kept.clear()
        with MODES[other]():
            model(images)
        overwritten[other] = {key for key, (out, before) in kept.items() if not torch.equal(out, before)}
    assert all(ratios)
    assert len(ratios) == len(gates(model)) * len(overwritten)
    assert overwritten[mode] == overwritten['grad']
    assert not {key for key in overwritten[mode] if '.bn3' in key and 'mobilenetv2' in name}


@pytest.mark.parametrize('name', slow_unless(lambda name: name in KINDS, MODELS))
def test_a_batch_of_none(name):
    model = timm.create_model(name, num_classes=7).eval()
    for context in MODES.values():
        with context():
            assert model(images_of(name)[:0]).shape == (0, 7)


@pytest.mark.parametrize('name', KINDS)
def test_backward_hooks_of_every_leaf(name):
    model, called = timm.create_model(name, zero_init_last=False) if 'resnet' in name else timm.create_model(name), []
    for module in model.modules():
        if getattr(module, 'inplace', False):
            module.inplace = False  # torch allows no writing to what such a hook watches
    leaves = {n: m for n, m in model.named_modules() if not list(m.children()) and not isinstance(m, nn.Identity)}
    for key, module in leaves.items():
        module.register_full_backward_hook(lambda m, grad_in, grad_out, key=key: called.append(key))
    for block in model.modules():  # the residual sum of timm's ResNet writes to the gated map
        if type(block).__name__ in ('GatedBasicBlock', 'GatedBottleneck'):
            block.attn.register_forward_hook(lambda m, args, out: out.clone())
    model(images_of(name)).sum().backward()
    assert set(called) == set(leaves)


# timm's CBAM has a norm layer of its own, which cannot be chosen, and its MobileNetV4 takes none
@pytest.mark.quick(13)
@pytest.mark.parametrize('name', [n for n in ALSO_SLOW if 'cbam' not in str(n) and 'mobilenetv4' not in str(n)])
def test_norm_layer_goes_everywhere(name):
    model = timm.create_model(name, norm_layer='groupnorm1', num_classes=5)
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert model(images_of(name)).shape == (2, 5)


@pytest.mark.parametrize('name', [case for case in ALSO_SLOW if not case.values[0].endswith('_cifar')])
def test_as_many_feature_maps_as_the_plain_net(name):
    plain = timm_spa.models._entrypoints.split_gate(name)[0]
    plain = 'mobilenetv2_100' if plain == 'mobilenetv2' else plain
    ours, theirs = (timm.create_model(n, features_only=True, device='meta').feature_info for n in (name, plain))
    assert ours.channels() == theirs.channels()
    assert ours.reduction() == theirs.reduction()


@pytest.mark.quick(3)
@pytest.mark.parametrize('name', slow_unless(lambda name: '50' not in name and 'densenet' not in name, KINDS))
def test_scripted(name):
    images = images_of(name)
    for kwargs in ({}, dict(features_only=True)):
        model = make_model(name, **kwargs)
        assert not kwargs or isinstance(model, FeatureListNet)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)
            torch.testing.assert_close(torch.jit.script(model)(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.quick(5)
@pytest.mark.parametrize('name', KINDS)
@torch.no_grad()
def test_fx_gives_equal_bits(name):
    """Traced by timm."""
    model, images = make_model(name), images_of(name)
    extractor = timm.models.FeatureGraphNet(copy.deepcopy(model), out_indices=(3,))
    maps = model.forward_intermediates(images, indices=(3,), intermediates_only=True)
    assert torch.equal(extractor(images)[0], maps[0])


@pytest.mark.quick(1)
@pytest.mark.parametrize('name', slow_unless(lambda name: '50' not in name, [
    'spa_resnet18', 'spa_b_resnet18', 'spa_c_resnet50', 'se_c_preresnet50_cifar', 'spa_mobilenetv2_cifar']))
@torch.no_grad()
def test_fx_static_quantization(name):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    model, images = make_model(name), images_of(name, 8)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping('x86'), (images,))
    prepared(images)
    quantized = convert_fx(prepared)
    assert rel(quantized(images), model(images)) < 0.3


ONNX = (
    'spa_resnet18', 'spa_b_resnet18', 'spa_c_resnet18', 'spa_mobilenetv2_050', 'spa_mobilenetv2_cifar',
    'spa_preresnet18_cifar', 'spa_densenet_cifar', 'spa_vgg16_cifar', 'se_mobilenetv2', 'ge_mobilenetv2')
QUICK = ('spa_c_resnet18',)  # to export by the newer ways, which take long for many layers


@pytest.mark.parametrize(('name', 'dynamo'), [
    *slow_unless(lambda name: name in ('spa_b_resnet18', 'spa_mobilenetv2_cifar'), [(name, False) for name in ONNX]),
    *slow_unless(lambda name: False, [(name, True) for name in ONNX])])
@torch.no_grad()
def test_onnx_agrees_at_every_batch_and_size(name, dynamo, tmp_path):
    """Also where the pyramid's sizes divide no side of a map, and where they divide that of the example."""
    model, side = make_model(name), 224 if image_size(name)[0] == 224 else 64
    x, path = torch.randn(2, 3, side, side), str(tmp_path / 'model.onnx')
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    shapes = {i: torch.export.Dim.DYNAMIC for i in axes}
    torch.onnx.export(
        model, (x,), path, dynamo=dynamo, input_names=['x'], output_names=['y'],
        **(dict(dynamic_shapes=(shapes,)) if dynamo else dict(dynamic_axes=dict(x=axes, y={0: 'batch'}))))
    session = onnxruntime.InferenceSession(path)
    for batch, height, width in ((2, side, side), (1, side // 2, side), (3, side + 21, side - 11)):
        x = torch.randn(batch, 3, height, width)
        y, = session.run(None, {'x': x.numpy()})
        assert rel(torch.from_numpy(y), model(x)) < 1e-5, (batch, height, width)


@pytest.mark.parametrize('name', slow_unless(lambda name: name in QUICK, sorted({*KINDS, *QUICK})))
@torch.no_grad()
def test_export_with_dynamic_height_and_width(name):
    model, images = make_model(name).double(), torch.randn(2, 3, 64, 64).double()
    sides = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    exported = torch.export.export(model, (images,), dynamic_shapes=(sides,)).module()
    for shape in ((2, 3, 64, 64), (1, 3, 81, 128), (3, 3, 119, 69)):
        other = torch.randn(shape, dtype=torch.float64)
        assert rel(exported(other), model(other)) < 1e-10


@pytest.mark.slow
@torch.no_grad()
def test_ahead_of_time_compiled(tmp_path):
    model = make_model('spa_resnet18')
    sides = {i: torch.export.Dim.DYNAMIC for i in (2, 3)}
    exported = torch.export.export(model, (torch.randn(2, 3, 112, 112),), dynamic_shapes=(sides,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / 'model.pt2'))
    package = torch._inductor.aoti_load_package(path)
    for height, width in ((112, 112), (129, 117), (224, 112)):
        x = torch.randn(2, 3, height, width)
        assert rel(package(x), model(x)) < 1e-5


@pytest.mark.quick(2)
@pytest.mark.parametrize('base', ['resnext50_32x4d', 'resnet18', 'wide_resnet50_2', 'resnet50d'])
def test_attention_slot_of_timm(base):
    """The layer as `attn_layer` of timm's own models."""
    model = timm.create_model(base, block_args=dict(attn_layer=timm_spa.SpatialPyramidAttention)).eval()
    blocks = [m for m in model.modules() if hasattr(m, 'zero_init_last')]
    assert all(isinstance(block.se, timm_spa.SpatialPyramidAttention) for block in blocks)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
    again = timm.create_model(base, block_args=dict(attn_layer=timm_spa.SpatialPyramidAttention)).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), expected)
