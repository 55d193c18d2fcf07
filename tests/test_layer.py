"""The layer against the equations of the paper, over shapes, pyramids, variants, dtypes and memory formats."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import spatial_pyramid_attention

from timm_spa import SpatialPyramidAttention
from timm_spa.layers import GATES, SqueezeExcite, create_gate, gating, pyramid

VARIANTS = ('a', 'b', 'c')


def make_layer(channels, in_channels, variant, pyramid_sizes, seed=0, **kwargs):
    """A layer whose every parameter and statistic is random, so that none of them can be left out unnoticed."""
    layer = SpatialPyramidAttention(
        channels, None if variant == 'a' else in_channels, variant=variant, pyramid_sizes=pyramid_sizes, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if not name.endswith('num_batches_tracked'):
                low, high = (0.5, 1.5) if name.endswith('running_var') else (-1.0, 1.0)
                value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    return layer


def make_inputs(batch, channels, in_channels, size, in_size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
    block_input = torch.randn(batch, in_channels, *in_size, generator=generator, dtype=torch.float64).to(dtype)
    return x, block_input


def oracle(layer, x, block_input):
    double = {k: v.detach().double() for k, v in layer.state_dict().items()}
    return spatial_pyramid_attention(
        double, x.double(), block_input.double(), layer.variant, layer.pyramid_sizes, layer.training)


def rel(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


sizes = st.integers(1, 17)
cases = st.fixed_dictionaries(dict(
    variant=st.sampled_from(VARIANTS),
    pyramid_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True).map(tuple),
    channels=st.integers(1, 20),
    in_channels=st.integers(1, 20),
    batch=st.integers(1, 3),
    size=st.tuples(sizes, sizes),
    in_size=st.tuples(sizes, sizes),
    rd_ratio=st.sampled_from([1 / 16, 1 / 3, 1.0]),
    seed=st.integers(0, 1000),
))


@given(case=cases)
@settings(max_examples=150, deadline=None)
def test_forward_is_the_equation(case):
    """Any map, also smaller than the pyramid and not divisible by it, a batch of one included."""
    layer = make_layer(
        case['channels'], case['in_channels'], case['variant'], case['pyramid_sizes'], case['seed'],
        rd_ratio=case['rd_ratio']).double().eval()
    x, block_input = make_inputs(
        case['batch'], case['channels'], case['in_channels'], case['size'], case['in_size'], case['seed'])
    y = layer(x, block_input)
    assert y.shape == x.shape
    assert rel(y, oracle(layer, x, block_input)) < 1e-12


@given(case=cases)
@settings(max_examples=60, deadline=None)
def test_backward_is_the_gradient_of_the_equation(case):
    """In training mode, for both inputs and every parameter."""
    layer = make_layer(
        case['channels'], case['in_channels'], case['variant'], case['pyramid_sizes'], case['seed']).double().train()
    x, block_input = make_inputs(
        case['batch'] + 1, case['channels'], case['in_channels'], case['size'], case['in_size'], case['seed'])
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case['seed']))
    expected_inputs = [v.clone().requires_grad_() for v in (x, block_input)]
    parameters = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    y = spatial_pyramid_attention(parameters, *expected_inputs, layer.variant, layer.pyramid_sizes, training=True)
    (y * upstream).sum().backward()

    inputs = [v.clone().requires_grad_() for v in (x, block_input)]
    (layer(*inputs) * upstream).sum().backward()
    pairs = [(a.grad, e.grad) for a, e in zip(inputs, expected_inputs, strict=True)]
    pairs += [(v.grad, parameters[k].grad) for k, v in layer.named_parameters()]
    scale = max(e.norm().item() for _, e in pairs if e is not None)
    for actual, expected in pairs:
        if expected is None:
            assert actual is None  # variant a does not read the block's input
        else:
            # a norm layer over one value divides rounding by sqrt(eps)
            assert (actual - expected).norm().item() < 1e-8 * max(scale, 1.0)


@pytest.mark.parametrize('size', [(7, 7), (14, 14), (56, 28), (21, 35), (13, 9), (4, 4), (17, 28)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('pyramid_sizes', [(1, 4, 7), (1, 2, 4), (7,), (1,), (2, 3)])
@pytest.mark.parametrize('inplace', [False, True])
def test_every_form_is_the_equation(size, memory_format, pyramid_sizes, inplace):
    """With and without a gradient, which choose how a map is pooled and gated; in place only without."""
    layer = make_layer(24, 24, 'a', pyramid_sizes, inplace=inplace).double().eval()
    x, _ = make_inputs(3, 24, 24, size, size)
    x = x.to(memory_format=memory_format)
    before, expected = x.clone(), oracle(layer, x, x)
    assert rel(layer(x), expected) < 1e-12
    assert torch.equal(x, before), 'a gradient may be wanted'
    with torch.no_grad():
        y = layer(x)
    assert rel(y, expected) < 1e-12
    assert y.is_contiguous(memory_format=memory_format)
    if not inplace:
        assert torch.equal(x, before)
    elif not any(side % max(pyramid_sizes) for side in size):
        assert y.data_ptr() == x.data_ptr()


PYRAMIDS = ('_plain_pyramid', '_pyramid_of_pools', '_pyramid_by_products')


@pytest.mark.parametrize(('form', 'size', 'memory_format', 'compiling', 'dtype'), [
    ('_plain_pyramid', (28, 28), torch.contiguous_format, True, torch.float32),
    ('_plain_pyramid', (7, 7), torch.channels_last, True, torch.float32),
    ('_plain_pyramid', (14, 14), torch.contiguous_format, True, torch.float32),
    ('_pyramid_of_pools', (28, 28), torch.channels_last, False, torch.float32),
    ('_pyramid_of_pools', (14, 14), torch.contiguous_format, False, torch.bfloat16),
    ('_pyramid_by_products', (28, 28), torch.contiguous_format, False, torch.float32),
    ('_pyramid_by_products', (14, 14), torch.contiguous_format, False, torch.float64),
])
@pytest.mark.parametrize('grad', [False, True])
def test_each_form_is_taken(monkeypatch, form, size, memory_format, compiling, dtype, grad):
    """The form that is meant for a map is the one that pools it."""
    taken = []
    for name in PYRAMIDS:
        original = getattr(pyramid, name)
        monkeypatch.setattr(
            pyramid, name, lambda *args, name=name, original=original: (taken.append(name), original(*args))[1])
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    layer = make_layer(8, 8, 'a', (1, 4, 7)).to(dtype).eval()
    x = torch.randn(2, 8, *size, dtype=dtype).to(memory_format=memory_format)
    with torch.set_grad_enabled(grad):
        assert rel(layer(x), oracle(layer, x, x)) < (1e-5 if dtype is not torch.bfloat16 else 3e-2)
    assert taken == [form]


@pytest.mark.parametrize('size', [(7, 7), (14, 14), (28, 21), (9, 8)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('adds', [False, True])
def test_gradients_of_a_gated_map(size, memory_format, adds):
    """First and second derivatives against differences, forward mode against reverse."""
    generator = torch.Generator().manual_seed(0)
    x, gate, shortcut = (
        torch.randn(1, 2, *s, generator=generator, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        for s in (size, (7, 7), size))
    inputs = (x, gate, shortcut) if adds else (x, gate)
    assert torch.autograd.gradcheck(gating.gate_regions, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(gating.gate_regions, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(gating.gate_regions, inputs, fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_training_keeps_one_map(memory_format):
    """For the gradient of the gating: the map, and no enlarged gate. Its result may be written in place."""
    layer = make_layer(32, 32, 'a', (1, 4, 7))
    x = torch.randn(2, 32, 56, 56).to(memory_format=memory_format).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda v: (kept.__setitem__(v.untyped_storage().data_ptr(), v.numel()), v)[1], lambda v: v):
        y = layer(x * 1)
        y += 1
    assert sum(n >= x.numel() for n in kept.values()) == 1
    y.sum().backward()


@pytest.mark.parametrize('strict', [False, True])
def test_exported_and_recorded_maps_take_the_plain_form(monkeypatch, strict):
    """A graph for all shapes must not hold what suits one."""
    taken = []
    original = pyramid._plain_pyramid
    monkeypatch.setattr(pyramid, '_plain_pyramid', lambda *args: (taken.append(1), original(*args))[1])
    layer, x = make_layer(8, 8, 'a', (1, 4, 7)).eval(), torch.randn(2, 8, 14, 14)
    sides = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=dict(x=sides), strict=strict).module()
    assert strict or taken  # a strict export reads the code, and does not call what stands in for it
    kinds = {str(node.target) for node in exported.graph.nodes if node.op == 'call_function'}
    assert {'aten.adaptive_avg_pool2d.default', 'aten.conv2d.default'} <= kinds
    assert not {kind for kind in kinds if 'mm' in kind or 'matmul' in kind or 'linear' in kind}
    for size in ((14, 14), (28, 21), (9, 40)):
        other = torch.randn(3, 8, *size)
        torch.testing.assert_close(exported(other), layer(other))
    taken.clear()
    torch.jit.trace(layer, x, check_trace=False)
    assert taken


@pytest.mark.parametrize('part', ['fc1', 'fc2', 'bn', 'matcher', 'matcher.fc1', 'matcher.fc2', 'matcher.bn2'])
@torch.no_grad()
def test_every_part_can_be_listened_to(part):
    """A hook on any of them is called, once for a call of the layer."""
    layer, heard = make_layer(8, 6, 'c', (1, 4, 7)).eval(), []
    layer.get_submodule(part).register_forward_hook(lambda module, inputs, output: heard.append(output * 0))
    layer(*make_inputs(2, 8, 6, (14, 14), (14, 14), dtype=torch.float32))
    assert len(heard) == 1


@torch.no_grad()
def test_fused_norm_layers():
    """What torch makes of a convolution and its norm layer has a bias, which ours has not."""
    layer = make_layer(8, 6, 'c', (1, 4, 7), rd_ratio=1.0).eval()
    inputs = make_inputs(2, 8, 6, (14, 14), (14, 14), dtype=torch.float32)
    expected = oracle(layer, *inputs)
    for module, conv, norm in ((layer, 'fc1', 'bn'), (layer.matcher, 'fc2', 'bn2')):
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
        setattr(module, conv, fused)
        setattr(module, norm, torch.nn.Identity())
        assert rel(layer(*inputs), expected) < 1e-5


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [7, 14, 28])
@torch.no_grad()
def test_autocast_does_not_round_means(memory_format, size):
    """A mean stays in the precision of its map, as torch's pooling layers have it."""
    x, weight = torch.randn(2, 8, size, size).to(memory_format=memory_format), torch.rand(3)
    expected = pyramid._plain_pyramid(x, [7, 4, 1], weight)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(pyramid.weighted_pyramid(x, [7, 4, 1], weight), expected)


def test_functional_transforms():
    """torch.func sees no map written in place, and gives for each what the layer gives."""
    layer = make_layer(8, 8, 'a', (1, 4, 7), inplace=True).eval()
    x = torch.randn(3, 2, 8, 14, 14)
    with torch.no_grad():
        expected = torch.stack([layer(v.clone()) for v in x])
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)


@pytest.mark.parametrize('strided', [
    lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2, 1:15], lambda x: x[:1].expand(3, -1, -1, -1)])
def test_maps_that_are_not_dense(strided):
    layer = make_layer(6, 6, 'a', (1, 2, 4, 7)).double().eval()
    x = strided(make_inputs(3, 6, 6, (28, 28), (28, 28))[0])
    with torch.no_grad():
        assert rel(layer(x), oracle(layer, x, x)) < 1e-12


def test_constants_of_inference_serve_training():
    """What is kept between calls was made without a gradient in mind, and is used with one."""
    layer = SpatialPyramidAttention(8)
    x = torch.randn(2, 8, 19, 19)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(14, 14), (13, 9), (4, 4)])
def test_dtypes_and_memory_formats(variant, dtype, tolerance, memory_format, size):
    """Dtype and memory format of the gated map are those of the result, in either mode."""
    layer = make_layer(32, 24, variant, (1, 4, 7)).to(dtype).to(memory_format=memory_format)
    inputs = make_inputs(2, 32, 24, size, (2 * size[0], 2 * size[1]), dtype=dtype)
    x, block_input = (v.to(memory_format=memory_format) for v in inputs)
    for mode in (False, True):
        layer.train(mode)
        expected = oracle(layer, x, block_input)
        y = layer(x, block_input)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        assert rel(y, expected) < tolerance


@pytest.mark.parametrize('variant', VARIANTS)
def test_autocast_and_half_storage(variant):
    """Autocast keeps float32 parameters; a float16 layer runs where the backend has the kernels."""
    layer = make_layer(32, 24, variant, (1, 4, 7)).eval()
    x, block_input = make_inputs(2, 32, 24, (14, 14), (14, 14), dtype=torch.float32)
    expected = oracle(layer, x, block_input)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = layer(x.bfloat16(), block_input.bfloat16())
    assert y.dtype == torch.bfloat16
    assert rel(y, expected) < 3e-2
    assert rel(layer.half()(x.half(), block_input.half()), expected) < 3e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_cuda(variant, dtype, tolerance):
    layer = make_layer(32, 24, variant, (1, 4, 7)).eval()
    x, block_input = make_inputs(2, 32, 24, (14, 13), (28, 26), dtype=torch.float32)
    expected = oracle(layer, x, block_input)
    y = layer.to('cuda', dtype)(x.to('cuda', dtype), block_input.to('cuda', dtype))
    assert rel(y.cpu(), expected) < tolerance


@pytest.mark.parametrize('variant', VARIANTS)
def test_no_state_survives_a_call(variant):
    """Sizes, dtypes and copies may change from call to call."""
    layer = make_layer(8, 6, variant, (1, 2, 4)).eval()
    for size in ((8, 8), (5, 7), (8, 8)):
        x, block_input = make_inputs(2, 8, 6, size, size, dtype=torch.float32)
        assert rel(layer(x, block_input), oracle(layer, x, block_input)) < 1e-5
    doubled = copy.deepcopy(layer).double()
    x, block_input = make_inputs(2, 8, 6, (8, 8), (8, 8))
    assert rel(doubled(x, block_input), oracle(layer, x, block_input)) < 1e-12


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('grad', [False, True])
def test_compile_and_script(variant, grad):
    """One graph without a break for all sizes, and TorchScript, both equal to eager."""
    layer = make_layer(8, 6, variant, (1, 2, 4)).eval()
    scripted = torch.jit.script(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager')
    with torch.set_grad_enabled(grad):
        for size in ((8, 8), (12, 20), (7, 5), (40, 28), (3, 3), (11, 4)):
            x, block_input = make_inputs(2, 8, 6, size, size, dtype=torch.float32)
            expected = layer(x, block_input)
            torch.testing.assert_close(compiled(x, block_input), expected)
            torch.testing.assert_close(scripted(x, block_input), expected)
    # square maps, and maps of the pyramid's own size, are what torch makes code of their own for
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= 3


@pytest.mark.parametrize('gate', [g for g in GATES if not g.startswith('spa')])
@pytest.mark.parametrize('size', [(8, 8), (5, 7)])
def test_comparison_gates(gate, size):
    """Same shape and place as SPA's; each gate is a factor between 0 and 1, and 'none' is exactly 1."""
    torch.manual_seed(0)
    layer = create_gate(gate, channels=16, in_channels=12, rd_ratio=0.5).eval()
    x, block_input = make_inputs(2, 16, 12, size, size, dtype=torch.float32)
    y = layer(x, block_input)
    ratio = y / x
    assert y.shape == x.shape
    assert (y == x).all() if gate == 'none' else ((ratio > 0) & (ratio < 1)).all()
    other = layer(x, block_input + 1)
    assert torch.equal(other, y) != layer.reads_block_input
    if layer.reads_block_input:
        with pytest.raises(ValueError, match='need block_input, got None'):
            layer(x)


@pytest.mark.parametrize('variant', VARIANTS)
def test_squeeze_excite_is_its_equation(variant):
    """SE, SE+ and SE++: SPA's oracle with a pyramid of the global mean alone, its weight one and no norm layer."""
    layer = SqueezeExcite(16, 12, variant, rd_ratio=0.25).double().eval()
    x, block_input = make_inputs(2, 16, 12, (5, 7), (10, 14))
    p = dict(layer.state_dict(), pyramid_weight=torch.ones(1).double())
    zeros, ones = torch.zeros(4).double(), torch.ones(4).double()
    p |= {'bn.weight': ones, 'bn.bias': zeros, 'bn.running_mean': zeros, 'bn.running_var': ones - 1e-5}
    expected = spatial_pyramid_attention(p, x, block_input, variant, (1,), training=False)
    assert rel(layer(x, block_input), expected) < 1e-12


def test_gate_has_the_resolution_of_the_pyramid():
    layer = SpatialPyramidAttention(32, pyramid_sizes=(1, 4, 7)).eval()
    gate = layer.forward_gate(torch.randn(2, 32, 28, 20))
    assert gate.shape == (2, 32, 7, 7)
    assert 0 < gate.min() <= gate.max() < 1


def test_parameters_are_the_authors():
    """C * C // r * 2 for the convs, 2 C // r for the norm layer, one weight a size; a matcher only where needed."""
    def count(**kwargs):
        return sum(p.numel() for p in SpatialPyramidAttention(256, **kwargs).parameters())

    assert count() == 2 * 256 * 16 + 2 * 16 + 3
    assert count(in_channels=64, variant='b') == 64 * 16 + 16 * 256 + 2 * 16 + 3
    assert count(in_channels=64, variant='c') == 2 * 256 * 16 + 2 * 16 + 3 + 64 * 16 + 16 * 256 + 2 * 16 + 2 * 256
    assert count(in_channels=256, variant='c') == count()
    assert count(rd_channels=5, pyramid_sizes=(7,)) == 2 * 256 * 5 + 2 * 5 + 1
    assert SpatialPyramidAttention(3).fc1.out_channels == 1


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(pyramid_sizes=()), r'pyramid_sizes must name at least one size, got \(\)'),
    (dict(pyramid_sizes=(1, 0)), r'pyramid_sizes must be whole numbers of at least 1, got 0 in \(1, 0\)'),
    (dict(pyramid_sizes=(1, 2.5)), r'pyramid_sizes must be whole numbers of at least 1, got 2\.5'),
    (dict(pyramid_sizes=(4, 1, 4)), r'pyramid_sizes must differ from each other, got \(4, 1, 4\)'),
    (dict(pyramid_sizes=7), r'pyramid_sizes must be a sequence of whole numbers, got 7'),
    (dict(pyramid_sizes='147'), r"pyramid_sizes must be a sequence of whole numbers, got '147'"),
    (dict(channels=0), r'channels must be at least 1, got 0'),
    (dict(in_channels=-2, variant='b'), r'in_channels must be at least 1, got -2'),
    (dict(rd_channels=0), r'rd_channels must be at least 1, got 0'),
    (dict(variant='d'), r"variant must be one of 'a', 'b', 'c', got 'd'"),
    (dict(in_channels=4), r'variant a gates the map that it reads: in_channels must be channels \(8\), got 4'),
])
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpatialPyramidAttention(**dict(dict(channels=8), **kwargs))


@pytest.mark.parametrize('variant', ['b', 'c'])
def test_missing_block_input_is_named(variant):
    layer = SpatialPyramidAttention(8, variant=variant)
    with pytest.raises(ValueError, match='need block_input, got None'):
        layer(torch.randn(2, 8, 7, 7))
