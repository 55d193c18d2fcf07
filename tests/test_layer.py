"""The layer against the equations of the paper, over shapes, pyramids, variants, dtypes and memory formats."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import average_pool, resize_nearest, spatial_pyramid_attention

from timm_spa import SpatialPyramidAttention
from timm_spa.layers import pyramid_formulas
from timm_spa.layers.spatial_pyramid_attn import weighted_pyramid

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
def test_layouts_and_modes(size, memory_format, pyramid_sizes):
    """The same bits with and without a gradient, in the memory format of the map, which stays as it is."""
    layer = make_layer(24, 24, 'a', pyramid_sizes).double().eval()
    x, _ = make_inputs(3, 24, 24, size, size)
    x = x.to(memory_format=memory_format)
    before, expected = x.clone(), oracle(layer, x, x)
    y = layer(x)
    assert rel(y, expected) < 1e-12
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = layer(x)
        assert torch.equal(again, y)
        assert again.is_contiguous(memory_format=memory_format)
        assert again.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


def formulas_of(kind, sizes):
    """The functions of a kind, as the layer calls them."""
    pyramids = dict(
        eager=pyramid_formulas._eager_pyramid, compiled=pyramid_formulas._compiled_pyramid,
        constant=pyramid_formulas._constant_pyramid, free=pyramid_formulas._free_pyramid)
    gates = dict(
        eager=pyramid_formulas.GateProduct.apply, compiled=pyramid_formulas._compiled_gate,
        constant=pyramid_formulas._constant_gate)
    return lambda x, w: pyramids[kind](x, list(sizes), w), gates.get(kind)


KINDS = ('eager', 'compiled', 'constant', 'free')
SIDES = [(7, 7), (14, 28), (28, 28), (56, 28), (9, 8), (3, 17), (1, 1), (30, 35)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', SIDES)
@pytest.mark.parametrize('sizes', [(7, 4, 1), (4, 2, 1), (3, 2), (7,), (1,)])
def test_formulas_of_the_pyramid(sizes, size, kind):
    """Each against the sums of the oracle: values, and gradients of feature map and weights."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(sizes), dtype=torch.float64, requires_grad=True)
    y = formulas_of(kind, sizes)[0](x, weight)
    levels = [resize_nearest(average_pool(x, n), sizes[0], sizes[0]) for n in sizes]
    expected = sum(w * level for w, level in zip(weight, levels, strict=True))
    torch.testing.assert_close(y, expected.expand_as(y))
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, weight), upstream), torch.autograd.grad(expected, (x, weight), upstream))


@pytest.mark.parametrize('kind', ['eager', 'compiled', 'constant'])
@pytest.mark.parametrize('size', SIDES)
@pytest.mark.parametrize('cells', [(7, 7), (4, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize('has_shortcut', [False, True])
def test_formulas_of_the_gate(cells, size, kind, has_shortcut):
    """Each against the copies of the oracle: values, and gradients of feature map, gate and shortcut."""
    x, shortcut = (torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = torch.rand(2, 3, *cells, dtype=torch.float64, requires_grad=True)
    inputs = (x, gate, *([shortcut] if has_shortcut else []))
    y = formulas_of(kind, (7,))[1](*inputs)
    expected = x * resize_nearest(gate, *size) + (shortcut if has_shortcut else 0)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize('cells', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_resized_gate_is_exact(cells, memory_format):
    """At every size, with some of which torch's own resizing rounds indices down: 4 to 82, 7 to 287."""
    for length in [*range(1, 100), 123, 164, 287, 574]:
        x = torch.ones(1, 2, length, 3).to(memory_format=memory_format)
        gate = torch.rand(1, 2, cells, cells).to(memory_format=memory_format)
        expected = resize_nearest(gate, length, 3)
        for kind in ('eager', 'compiled', 'constant'):
            assert torch.equal(formulas_of(kind, (7,))[1](x, gate), expected), (kind, length)


def test_edges_of_cells_need_no_division():
    """The matrices' comparisons, and the cells of adaptive pooling and of nearest resizing by division."""
    like = torch.zeros((), dtype=torch.float64)
    for length in range(1, 130):
        for size in (1, 2, 3, 4, 5, 7, 16, 40):
            start = torch.arange(size) * length // size
            end = ((torch.arange(size) + 1) * length + size - 1) // size
            place = torch.arange(length)
            expected = ((place >= start[:, None]) & (place < end[:, None])) / (end - start)[:, None].double()
            assert torch.equal(pyramid_formulas._averages(size, length, like), expected)
            assert expected.tolist() == pyramid_formulas._average_rows(length, size, size)
            nearest = pyramid_formulas._membership(size, length, like)
            assert torch.equal(nearest.argmax(1), place * size // length)
            assert (nearest.sum(1) == 1).all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('size', [(14, 14), (9, 8)])
def test_formulas_in_half_precision(size, kind):
    """The dtype of the feature map is that of the result, and means are not rounded further than it is."""
    x, weight, gate = torch.randn(2, 8, *size), torch.rand(3), torch.rand(2, 8, 7, 7)
    pyramid, apply = formulas_of(kind, (7, 4, 1))
    half = pyramid(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.bfloat16
    assert rel(half, pyramid(x, weight).double()) < 2e-2
    if apply is not None:
        assert apply(x.bfloat16(), gate.bfloat16()).dtype == torch.bfloat16
        assert rel(apply(x.bfloat16(), gate.bfloat16()), apply(x, gate).double()) < 2e-2


@torch.no_grad()
def test_autocast_does_not_round_means():
    """A mean keeps the precision of its map, as in torch's pooling layers."""
    x, weight = torch.randn(2, 8, 14, 14), torch.rand(3)
    for kind in ('eager', 'compiled'):
        function = formulas_of(kind, (7, 4, 1))[0]
        expected = function(x, weight)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(function(x, weight), expected)
    with torch.autocast('cpu', torch.bfloat16):
        assert weighted_pyramid(x, [7, 4, 1], weight).dtype == torch.float32


@torch.no_grad()
def test_functional_transforms():
    """vmap over maps, and over the parameters of several layers."""
    layers = [make_layer(8, 8, 'a', (1, 4, 7), seed).eval() for seed in (0, 1)]
    x = torch.randn(3, 2, 8, 14, 14)
    torch.testing.assert_close(torch.func.vmap(layers[0])(x), torch.stack([layers[0](v) for v in x]))
    state = torch.func.stack_module_state(layers)
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x[0],)))(*state)
    torch.testing.assert_close(y, torch.stack([layer(x[0]) for layer in layers]))


@pytest.mark.parametrize('strided', [
    lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2, 1:15], lambda x: x[:1].expand(3, -1, -1, -1)])
def test_maps_that_are_not_dense(strided):
    layer = make_layer(6, 6, 'a', (1, 2, 4, 7)).double().eval()
    x = strided(make_inputs(3, 6, 6, (28, 28), (28, 28))[0])
    with torch.no_grad():
        assert rel(layer(x), oracle(layer, x, x)) < 1e-12


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


@pytest.mark.quick(3)
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
    *(
        (dict(pyramid_sizes=sizes), f'pyramid_sizes must be different whole numbers of at least 1, got {shown}')
        for sizes, shown in (
            ((), r'\(\)'), ((1, 0), r'\(1, 0\)'), ((1, 2.5), r'\(1, 2\.5\)'), ((4, 1, 4), r'\(4, 1, 4\)'),
            ((True, 4), r'\(True, 4\)'), (7, '7'), ('147', "'147'"))),
    (dict(channels=0), r'channels must be at least 1, got 0'),
    (dict(in_channels=-2, variant='b'), r'in_channels must be at least 1, got -2'),
    (dict(rd_channels=0), r'rd_channels must be at least 1, got 0'),
    (dict(variant='d'), r"variant must be one of 'a', 'b', 'c', got 'd'"),
    (dict(in_channels=4), r'in_channels must be channels in variant a, 8, got 4'),
])
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpatialPyramidAttention(**dict(dict(channels=8), **kwargs))


@pytest.mark.parametrize('variant', ['b', 'c'])
def test_missing_block_input_is_named(variant):
    layer = SpatialPyramidAttention(8, variant=variant)
    with pytest.raises(ValueError, match='need block_input, got None'):
        layer(torch.randn(2, 8, 7, 7))


@pytest.mark.parametrize(('shape', 'input_shape', 'wanted'), [
    ((8, 7, 7), (2, 6, 7, 7), r'x must have the shape \(N, 8, H, W\), got \[8, 7, 7\]'),
    ((2, 4, 7, 7), (2, 6, 7, 7), r'x must have the shape \(N, 8, H, W\), got \[2, 4, 7, 7\]'),
    ((2, 8, 7, 7), (2, 8, 7, 7), r'block_input must have the shape \(N, 6, H, W\), got \[2, 8, 7, 7\]'),
    ((2, 8, 7, 7), (6, 7, 7), r'block_input must have the shape \(N, 6, H, W\), got \[6, 7, 7\]'),
])
@pytest.mark.parametrize('variant', VARIANTS)
def test_maps_of_another_shape_are_named(shape, input_shape, wanted, variant):
    layer = make_layer(8, 6, variant, (1, 4, 7))
    if variant == 'a' and 'block_input' in wanted:
        layer(torch.randn(shape), torch.randn(input_shape))  # it does not read the block's input
    else:
        with pytest.raises(ValueError, match=wanted):
            layer(torch.randn(shape), torch.randn(input_shape))
