"""What a training step of the layer keeps in memory, and its derivatives in every way to run it."""
import re

import pytest
import timm
import torch
import torch.nn as nn
from functorch.compile import make_boxed_func
from marks import slow_unless
from oracle import spatial_pyramid_attention
from test_layer import make_inputs, make_layer
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from timm_spa import SpatialPyramidAttention, add_attention
from timm_spa.benchmark_worker import bytes_kept_for_backward
from timm_spa.layers import GatherExciteConv
from timm_spa.layers.spatial_pyramid_attn import apply_gate, weighted_pyramid

MIB = 2 ** 20
SIDES = [(14, 14), (9, 11)]  # that the pyramid's sizes divide, but for one, and that none divides


def kept(net, x, call=None):
    """MiB kept for the backward pass of an image."""
    return bytes_kept_for_backward(net, lambda: (net if call is None else call)(x)) / MIB / len(x)


def bottleneck(name, stage=1):
    """A block of a network, and an input for it."""
    block = getattr(timm.create_model(name), f'layer{stage + 1}')[1].train()
    channels = block.conv1.in_channels
    return block, torch.randn(2, channels, 56 >> stage, 56 >> stage, requires_grad=True)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('stage', range(4))
@pytest.mark.parametrize('gate', slow_unless(lambda gate: gate == 'spa', ['spa', 'spa_b', 'spa_c']))
def test_memory_of_a_block(gate, stage, memory_format):
    """At most the gated map, pyramid and gate over the plain block, and squeeze-and-excitation keeps that map too."""
    figures = {}
    for name in ('resnet50', 'seresnet50', f'{gate}_resnet50'):
        block, x = bottleneck(name, stage)
        figures[name] = kept(block.to(memory_format=memory_format), x.to(memory_format=memory_format))
    plain, se, spa = figures.values()
    small_maps = 49 * 4 * 2 * (x.shape[1] + x.shape[1] // 16) / MIB
    assert plain < se < spa < se + 1.02 * small_maps


@pytest.mark.parametrize('side', [28, 30])
@pytest.mark.parametrize('layer', [
    lambda: SpatialPyramidAttention(64), lambda: SpatialPyramidAttention(64, variant='b'),
    lambda: SpatialPyramidAttention(64, variant='c'), lambda: GatherExciteConv(64)])
def test_gate_is_kept_at_its_own_size(layer, side):
    """Also where its sides do not divide those of the feature map."""
    layer, x = layer(), torch.randn(2, 64, side, side, requires_grad=True)
    y = torch.randn(2, 64, side, side, requires_grad=True)
    whole = 64 * side ** 2 * 4 / MIB
    maps = 2 if getattr(layer, 'reads_block_input', False) else 1
    downscaled = 0.8 * whole if isinstance(layer, GatherExciteConv) else 3 * 49 * 64 * 4 / MIB
    assert maps * whole < kept(layer, x, lambda x: layer(x, y)) < maps * whole + downscaled


def test_memory_of_added_gates():
    """`add_attention` brings the same savings."""
    def create(gate):
        model = timm.create_model('mobilenetv2_050', num_classes=2).train()
        return model if gate == 'none' else add_attention(model, gate)

    x = torch.randn(2, 3, 128, 128)
    plain, se, spa = (kept(create(gate), x) for gate in ('none', 'se', 'spa'))
    assert plain < se < spa < 1.06 * se


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'base', 'limit'), [
    ('spa_resnet50', 'seresnet50', 1.06), ('spa_b_resnet50', 'seresnet50', 1.06),
    ('spa_c_resnet50', 'seresnet50', 1.35),
    ('spa_mobilenetv2', 'mobilenetv2_100', 1.04), ('spa_densenet_cifar', 'se_densenet_cifar', 1.03)])
def test_memory_of_a_network(name, base, limit):
    """The variant c keeps the matched feature map and its convolution's output besides."""
    nets = [timm.create_model(n).train() for n in (name, base)]
    figures = [kept(net, torch.randn(2, *net.pretrained_cfg['input_size'])) for net in nets]
    assert figures[0] <= limit * figures[1]


KERNELS = re.compile(r'\b(?:extern_kernels\.\w+|torch\.ops\.aten\.\w+|aten\.\w+)(?=[.\w]*\()')


def compiled_figures(net, x):
    """MiB kept by a compiled network, and the kernels that its training step calls."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(net)
    _, code = run_and_get_code(lambda: compiled(x).sum().backward())
    kernels = {kernel for text in code for kernel in KERNELS.findall(text.partition('def call')[2])}
    assert kernels
    return kept(net, x, compiled), kernels


@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 2, 3])
def test_compiled_block(stage):
    """No kernels besides those that the plain block has, and hardly more memory."""
    plain, kernels = compiled_figures(*bottleneck('resnet50', stage))
    spa, spa_kernels = compiled_figures(*bottleneck('spa_resnet50', stage))
    assert spa_kernels == kernels
    small_maps = 49 * 4 * 2 * (64 << 2 + stage) / MIB
    assert spa < plain + 1.3 * small_maps


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_network():
    """Memory and kernels of spa_resnet50 against those of resnet50."""
    x = torch.randn(2, 3, 224, 224)
    plain, kernels = compiled_figures(timm.create_model('resnet50').train(), x)
    spa, spa_kernels = compiled_figures(timm.create_model('spa_resnet50').train(), x)
    assert spa_kernels == kernels
    assert spa <= 1.08 * plain


@pytest.mark.parametrize('side', [7, 14, 30])
def test_compiled_code_has_no_tensor_larger_than_the_feature_map(side):
    """A CPU computes sums of products with matrices of averages 20 times slower than averages of slices."""
    sizes = []

    def record(graph, inputs):
        for node in graph.graph.nodes:
            value = node.meta.get('val')
            if isinstance(value, torch.Tensor) and value.dim() > 3 and len(value) == 2:
                sizes.append(value.numel())
        return make_boxed_func(graph.forward)

    layer, x = SpatialPyramidAttention(64), torch.randn(2, 64, side, side, requires_grad=True)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    assert max(sizes) == x.numel()


def expected_gradients(layer, inputs, upstream):
    """Those of the oracle, of the inputs and every parameter."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    parameters = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    y = spatial_pyramid_attention(parameters, *inputs, layer.variant, layer.pyramid_sizes, training=True)
    return torch.autograd.grad(y, [*inputs, *parameters.values()], upstream, allow_unused=True)


def traced(layer, inputs):
    return torch.jit.trace(layer, inputs, check_trace=False)


FORMS = dict(
    eager=lambda layer, inputs: layer,
    compiled=lambda layer, inputs: torch.compile(layer, backend='aot_eager', fullgraph=True),
    scripted=lambda layer, inputs: torch.jit.script(layer),
    traced=traced,
    exported=lambda layer, inputs: torch.export.export(layer, inputs).module(),
    checkpointed=lambda layer, inputs: lambda *args: checkpoint(layer, *args, use_reentrant=False),
    channels_last=lambda layer, inputs: lambda *args: layer(*(a.to(memory_format=torch.channels_last) for a in args)),
)


@pytest.mark.quick(20)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', SIDES)
@pytest.mark.parametrize('variant', 'abc')
def test_gradients_of_every_form(variant, size, form):
    """In float64, against the oracle."""
    torch._dynamo.reset()
    layer = make_layer(6, 4, variant, (1, 4, 7)).double().train()
    inputs = tuple(v.requires_grad_() for v in make_inputs(3, 6, 4, size, (2 * size[0], 2 * size[1])))
    upstream = torch.randn_like(inputs[0])
    expected = expected_gradients(layer, inputs, upstream)
    run = FORMS[form](layer, inputs)
    parameters = [*(run if form == 'exported' else layer).parameters()]
    found = torch.autograd.grad(run(*inputs), [*inputs, *parameters], upstream, allow_unused=True)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('size', SIDES)
def test_gradients_of_kernels(size):
    """Those of inductor's kernels, in float32 and channels_last."""
    torch._dynamo.reset()
    layer = make_layer(6, 6, 'a', (1, 4, 7)).train()
    inputs = [v.float().to(memory_format=torch.channels_last) for v in make_inputs(3, 6, 6, size, size)]
    inputs[0].requires_grad_()
    upstream = torch.randn_like(inputs[0])
    expected = expected_gradients(layer.double(), [v.double() for v in inputs], upstream.double())
    layer.float()
    y = torch.compile(layer, fullgraph=True)(*inputs)
    found = torch.autograd.grad(y, [inputs[0], *layer.parameters()], upstream)
    for a, b in zip(found, [expected[0], *expected[2:]], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', SIDES)
@pytest.mark.parametrize('function', ['pyramid', 'gate', 'gate and shortcut'])
def test_derivatives_of_second_order_and_forward_mode(function, size):
    x, shortcut = (torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = torch.rand(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    function, inputs = {
        'pyramid': (lambda x, w: weighted_pyramid(x, [7, 4, 1], w), (x, weight)), 'gate': (apply_gate, (x, gate)),
        'gate and shortcut': (apply_gate, (x, gate, shortcut))}[function]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize('size', SIDES)
def test_function_transforms(size):
    """Gradients of each image of a batch, derivatives in a direction, and both on top of each other."""
    layer = make_layer(3, 3, 'a', (1, 4, 7)).double().eval()
    state = {k: v.detach() for k, v in layer.named_parameters()}
    x, tangent = (v[:, None] for v in torch.randn(2, 3, 3, *size, dtype=torch.float64))

    def loss(state, x):
        return torch.func.functional_call(layer, state, (x,)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for i, image in enumerate(x):
        for key, value in torch.func.grad(loss)(state, image).items():
            torch.testing.assert_close(per_image[key][i], value)
        layer.zero_grad()
        layer(image).square().sum().backward()
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(per_image[key][i], parameter.grad)
    directed = torch.func.vmap(lambda x, t: torch.func.jvp(layer, (x,), (t,))[1])(x, tangent)
    step = 1e-6
    ahead, behind = layer(x[0] + step * tangent[0]), layer(x[0] - step * tangent[0])
    torch.testing.assert_close(directed[0], (ahead - behind) / 2 / step, rtol=1e-5, atol=1e-7)
    product = torch.func.jvp(torch.func.grad(lambda x: loss(state, x)), (x[0],), (tangent[0],))[1]
    y = x[0].clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(state, y), y, create_graph=True)
    expected, = torch.autograd.grad((gradient * tangent[0]).sum(), y)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', SIDES)
def test_gradients_under_autocast(size, dtype):
    """Parameters stay float32, and their gradients are as near to the exact ones as the dtype allows."""
    layer = make_layer(32, 32, 'a', (1, 4, 7)).train()
    x = make_inputs(4, 32, 32, size, size)[0].float().requires_grad_()
    upstream = torch.randn_like(x)
    expected = expected_gradients(layer.double(), [x.double(), x.double()], upstream.double())
    layer.float()
    with torch.autocast('cpu', dtype):
        y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    for a, b in zip(found, [expected[0], *expected[2:]], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 5e-2 * b.norm()


def test_a_sum_in_place_and_frozen_parts():
    """As in timm's blocks; what needs no gradient gets none, and nothing is kept for it."""
    layer, x = make_layer(4, 4, 'a', (1, 4, 7)).train(), torch.randn(2, 4, 14, 14, requires_grad=True)
    y = layer(x)
    y += x
    y.sum().backward()
    assert x.grad is not None
    layer.pyramid_weight.requires_grad_(False)
    nn.init.zeros_(layer.pyramid_weight)
    layer(x).sum().backward()
    frozen = x.detach()
    assert layer.requires_grad_(False)(frozen).requires_grad is False
    layer.fc2.requires_grad_(True)
    layer(frozen).sum().backward()
    assert layer.fc2.weight.grad is not None


@pytest.mark.parametrize('side', [14, 9])
def test_gradients_on_the_meta_device(side):
    """Sizes of a network are computed there, e.g. by detectors."""
    layer = SpatialPyramidAttention(8, device='meta')
    x = torch.empty(2, 8, side, side, device='meta', requires_grad=True)
    grads = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    assert [g.shape for g in grads] == [t.shape for t in (x, *layer.parameters())]
