"""The short way through the end of a residual block, against the equations and against the long way."""
import copy
import itertools

import oracle
import pytest
import timm
import torch
import torch.nn as nn
from test_layer import make_layer, rel
from timm.layers import BatchNormAct2d, DropPath

import timm_spa  # noqa: F401
from timm_spa.layers import SqueezeExcite, affine, gated_residual, residual, saves_passes, spatial_pyramid_attention

FORMATS = (torch.contiguous_format, torch.channels_last)
# these decide where a map is pooled, and how its gate is enlarged
SIZES = [(28, 28), (14, 14), (56, 28), (35, 21), (7, 7), (30, 17), (5, 4)]


def make_branch(variant='a', kernel=1, bias=False, has_factors=True, norm_layer=nn.BatchNorm2d, channels=(6, 16)):
    """Gate, last convolution and norm layer of a block, every value of theirs random."""
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, kernel, padding=kernel // 2, bias=bias)
    norm = norm_layer(channels[1], affine=has_factors)
    with torch.no_grad():
        for value in itertools.chain(norm.parameters(), [norm.running_mean]):
            value.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 1.5)
    return [m.eval() for m in (make_layer(channels[1], 8, variant, (1, 4, 7)), conv, norm)]


def make_maps(size, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Input of the convolution, input of the block, shortcut."""
    return [torch.randn(3, c, *size).to(dtype=dtype, memory_format=memory_format) for c in (6, 8, 16)]


def long_way(attn, conv, norm, x, block_input, shortcut):
    """In float64, and with plain arithmetic from the norm layer on."""
    attn, conv, norm = (copy.deepcopy(m).double() for m in (attn, conv, norm))
    y = conv(x.double()) - norm.running_mean[:, None, None]
    y = y / (norm.running_var + norm.eps).sqrt()[:, None, None]
    if norm.weight is not None:
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    gated = oracle.spatial_pyramid_attention(
        dict(attn.state_dict()), y, block_input.double(), attn.variant, attn.pyramid_sizes, training=False)
    return gated if shortcut is None else gated + shortcut.double()


@pytest.mark.parametrize('variant', ['a', 'b', 'c'])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize(('kernel', 'bias', 'has_factors'), [(1, False, True), (1, True, False), (3, True, True)])
@pytest.mark.parametrize('merged', [False, True])
@torch.no_grad()
def test_short_way_is_the_equation(monkeypatch, variant, size, memory_format, kernel, bias, has_factors, merged):
    """Wherever the pyramid is pooled, with the norm layer merged or not, with a shortcut and without."""
    monkeypatch.setattr(residual, 'MIN_VALUES', 0 if merged else 2 ** 40)
    monkeypatch.setattr(residual, 'MIN_PLACES_PER_WEIGHT', 0)
    branch = [m.double().to(memory_format=memory_format) for m in make_branch(variant, kernel, bias, has_factors)]
    x, block_input, shortcut = maps = make_maps(size, memory_format=memory_format)
    before = [v.clone() for v in maps]
    assert saves_passes(*branch, None, x)
    for to_add in (shortcut, None):
        y = gated_residual(*branch, x, block_input, to_add)
        assert rel(y, long_way(*branch, x, block_input, to_add)) < 1e-12
        assert y.is_contiguous(memory_format=memory_format)
    assert all(torch.equal(v, old) for v, old in zip(maps, before, strict=True)), 'only fresh maps may be written to'


@pytest.mark.parametrize(('size', 'kernel', 'channels', 'read', 'pooled'), [
    ((28, 28), 1, (256, 512), 256, 256),  # in front of the convolution
    ((7, 7), 1, (512, 1024), 1024, 64),  # too small for the product of the weights, and pooled where it is narrow
    ((7, 8), 1, (512, 1024), 1024, 1024),  # larger than the pyramid
    ((28, 28), 1, (16, 16), 16, 16),  # no wider behind it
    ((28, 28), 1, (16, 6), 6, 6),
    ((28, 28), 3, (6, 16), 16, 16),  # not affine place by place
])
@torch.no_grad()
def test_where_the_pyramid_is_pooled(monkeypatch, size, kernel, channels, read, pooled):
    """The channels of the maps tell. A hook on the gate's convolution is heard, which keeps that behind the pooling."""
    seen = []
    for module, name in (
            (residual, 'pyramid_through'), (spatial_pyramid_attention, 'pyramid_through'),
            (affine, 'weighted_pyramid'), (spatial_pyramid_attention, 'weighted_pyramid')):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *args, f=original: (seen.append(x.shape[1]), f(x, *args))[1])
    attn, conv, norm = make_branch('a', kernel, channels=channels)
    maps = [torch.randn(2, c, *size) for c in (channels[0], 8, channels[1])]
    y = gated_residual(attn, conv, norm, *maps)
    attn.fc1.register_forward_hook(lambda module, inputs, output: seen.append('heard'))
    assert rel(gated_residual(attn, conv, norm, *maps), y) < 1e-5
    assert seen == [read, pooled, channels[1], 'heard']


@pytest.mark.parametrize('variant', ['a', 'c'])
@pytest.mark.parametrize('part', ['fc1', 'fc2', 'matcher'])
@torch.no_grad()
def test_parts_of_the_gate_may_be_wrapped(variant, part):
    """As adapters and quantizers do, whose modules have no weight, or one of another kind."""
    attn, conv, norm = make_branch(variant)
    maps = make_maps((28, 28), torch.float32)
    expected = long_way(attn, conv, norm, *maps)
    setattr(attn, part, nn.Sequential(getattr(attn, part)))
    assert saves_passes(attn, conv, norm, None, maps[0])
    assert rel(gated_residual(attn, conv, norm, *maps), expected) < 1e-5


@pytest.mark.parametrize(('stored', 'autocast', 'tolerance'), [
    (torch.float32, None, 1e-5), (torch.bfloat16, None, 3e-2), (torch.float16, None, 4e-3),
    (torch.float32, torch.bfloat16, 3e-2), (torch.float32, torch.float16, 4e-3)])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('size', [(28, 28), (13, 9)])
@torch.no_grad()
def test_other_dtypes(stored, autocast, tolerance, memory_format, size):
    branch = [m.to(dtype=stored, memory_format=memory_format) for m in make_branch('a')]
    maps = make_maps(size, stored, memory_format)
    expected = long_way(*branch, *maps)
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        y = gated_residual(*branch, *maps)
        attn, conv, norm = branch
        dtype = (attn(norm(conv(maps[0])), maps[1]) + maps[2]).dtype
    assert rel(y, expected) < tolerance
    assert y.dtype == dtype


@pytest.mark.parametrize('variant', ['a', 'b', 'c'])
@torch.no_grad()
def test_compiled_code_expects_channels_side_by_side(variant):
    """That is how the compiler lays maps out on a CPU: no product for every row, no map brought to another layout."""
    torch._dynamo.reset()
    branch, maps = make_branch(variant), make_maps((14, 14), torch.float32)
    compiled = torch.compile(lambda *maps: gated_residual(*branch, *maps), fullgraph=True)
    y, (code,) = torch._inductor.utils.run_and_get_code(compiled, *maps)
    assert rel(y, long_way(*branch, *maps)) < 1e-5
    assert 'extern_kernels.mm(' in code
    assert 'bmm(' not in code


@pytest.mark.parametrize('variant', ['a', 'b', 'c'])
@pytest.mark.parametrize('memory_format', FORMATS)
@torch.no_grad()
def test_compiled(variant, memory_format):
    """By the backend that users run, in one graph, for sizes that change and ones that do not."""
    branch = [m.to(memory_format=memory_format) for m in make_branch(variant)]
    for dynamic, sizes in ((False, [(28, 28), (14, 14)]), (True, [(28, 28), (35, 21), (9, 14), (5, 4), (42, 14)])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(
            lambda *maps: gated_residual(*branch, *maps), fullgraph=True, dynamic=dynamic,
            backend='aot_eager' if dynamic else 'inductor')
        for size in sizes:
            maps = make_maps(size, torch.float32, memory_format)
            assert rel(compiled(*maps), long_way(*branch, *maps)) < 1e-5
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= 2


def hook(module, inputs, output):
    return output * 2


def offload(module):
    forward = module.forward
    module.forward = lambda x: forward(x)


class OtherWeight(nn.Parameter):
    """What a library for quantized weights puts in the place of a parameter."""


REASONS = {
    'hook on the gate': lambda b: b[0].register_forward_hook(hook),
    'hook on the convolution': lambda b: b[1].register_forward_hook(hook),
    'hook before the norm layer': lambda b: b[2].register_forward_pre_hook(lambda module, inputs: None),
    'forward of its own': lambda b: offload(b[1]),
    'parametrized': lambda b: nn.utils.parametrizations.weight_norm(b[1]),
    'other weight': lambda b: setattr(b[1], 'weight', OtherWeight(b[1].weight.detach())),
    'other convolution': lambda b: b.__setitem__(1, nn.Sequential(b[1])),
    'other norm layer': lambda b: b.__setitem__(2, nn.GroupNorm(2, 16)),
    'norm layer with an activation': lambda b: b.__setitem__(2, BatchNormAct2d(16).eval()),
    'norm layer without statistics': lambda b: b.__setitem__(2, nn.BatchNorm2d(16, track_running_stats=False).eval()),
    'norm layer in training': lambda b: b[2].train(),
    'other gate': lambda b: b.__setitem__(0, SqueezeExcite(16).eval()),
    'dropped paths': lambda b: b.__setitem__(3, DropPath(0.5).train()),
    'gradient': None,
    'meta': None,
}


@pytest.mark.parametrize('reason', REASONS)
def test_long_way_where_the_modules_do_more(reason):
    """What was put on or in the place of a module still happens."""
    branch = [*make_branch('a'), DropPath(0.5).eval()]
    x = torch.randn(2, 6, 28, 28)
    with torch.no_grad():
        assert saves_passes(*branch, x)
        without_act = make_branch(norm_layer=lambda *args, **kwargs: BatchNormAct2d(*args, apply_act=False, **kwargs))
        assert saves_passes(*without_act, None, x)
    if REASONS[reason] is not None:
        REASONS[reason](branch)
    with torch.set_grad_enabled(reason == 'gradient'):
        assert not saves_passes(*branch, x.to('meta') if reason == 'meta' else x)


@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_resnet50', 'spa_c_resnet50', 'spa_mobilenetv2'])
@pytest.mark.parametrize('size', [224, 160])
def test_models_take_the_short_way(monkeypatch, name, size):
    """In every block, with the results of the long way; a hook on one of them is heard."""
    taken = []
    for module in (timm_spa.models.resnet, timm_spa.models.efficientnet):
        monkeypatch.setattr(
            module, 'gated_residual', lambda *args, f=module.gated_residual: (taken.append(1), f(*args))[1])
    model = timm.create_model(name).eval()
    for value in model.state_dict().values():
        if value.dtype.is_floating_point and value.ndim == 1:
            value.uniform_(0.5, 1)
    gates = [m for m in model.modules() if type(m) is timm_spa.SpatialPyramidAttention]
    x = torch.randn(2, 3, size, size)
    expected = model.forward_features(x)
    assert not taken, 'a gradient is wanted'
    with torch.no_grad():
        assert rel(model.forward_features(x), expected.double()) < 1e-5
        assert len(taken) == len(gates)
        heard = []
        gates[0].register_forward_hook(lambda module, inputs, output: heard.append(output.shape))
        model.forward_features(x)
    assert len(heard) == 1
    assert len(taken) == 2 * len(gates) - 1


@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_c_resnet50', 'spa_mobilenetv2'])
@torch.no_grad()
def test_scripted_models(name):
    """TorchScript compiles what stands after `and`, also where it is never reached."""
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ensemble_of_functional_models():
    """vmap over the parameters of several models, as torch.func's tutorial has it."""
    models = [timm.create_model('spa_resnet18', num_classes=3).eval() for _ in range(2)]
    params, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 64, 64)
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(y, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-5)
