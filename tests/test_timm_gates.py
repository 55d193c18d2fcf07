"""timm's attention layers as gates: the same function at the start, gradients for every parameter, and timm's tools."""
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from marks import slow_unless
from test_add_attention import random_net, relative

import timm_spa
from timm_spa.checkpoints.warm_start import gated_modules
from timm_spa.export import export
from timm_spa.models import GATES, create_gate
from timm_spa.models._entrypoints import split_gate

TIMM_GATES = ['ese', 'eca', 'ecam', 'ceca', 'gca', 'lcbam', 'coord', 'scoord', 'ela', 'strip']
# small networks of different families, with gates on 16 to 1024 channels; one has group norm, one has layer norm
BASES = [
    'resnet18', 'regnety_002', 'resnet26t', 'gernet_s', 'convnext_atto', 'ghostnet_100', 'repvgg_a0', 'densenet121',
    'mobilenetv3_small_050', 'tf_efficientnet_lite0', 'mobilenetv2_050', 'ese_vovnet19b_dw', 'starnet_s1', 'vgg11_bn',
    'mobilenetv4_conv_small', 'cs3darknet_s', 'rexnet_100', 'resnet50_gn']
QUICK_NARROW = [('mobilenetv3_small_050', 'se_bias'), ('mobilenetv2_050', 'cbam'), ('tf_efficientnet_lite0', 'se')]
# a softmax ignores the first shift; batch norm after a pointwise convolution removes what the others add to all images
WITHOUT_EFFECT = ('layer.conv_attn.bias', 'layer.mlp_add.norm.bias', 'layer.mlp_add.fc2.bias')


def new_parameters(model):
    return {name: p for name, p in model.named_parameters() if '.attn.layer.' in name}


def without_gradient(parameters):
    """Names of the parameters whose gradient is zero but for rounding errors of double precision."""
    return [name for name, p in parameters.items() if p.grad.abs().max() < 1e-14]


def train(model, images, steps=3):
    """A few steps of gradient descent; the gradients of the last one stay."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(len(images)) % 2).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(('base', 'gate'), [
    pytest.param(base, gate, marks=[] if TIMM_GATES[i:i + 1] == [gate] else [pytest.mark.slow])
    for i, base in enumerate(BASES) for gate in TIMM_GATES])
def test_same_outputs_until_trained(base, gate):
    """Odd and non-square maps, and maps of one pixel in the last stage."""
    model = random_net(base, num_classes=10)
    exact = random_net(base, num_classes=10).double()
    images = [torch.randn(2, 3, *size) for size in ((65, 96), (32, 32))]
    with torch.no_grad():
        expected = [(model(x), exact(x.double())) for x in images]
        timm_spa.add_attention(model, gate)
        timm_spa.add_attention(exact, gate)
        for x, (single, double) in zip(images, expected, strict=True):
            assert (model(x) - single).abs().max() <= 1e-6 * single.abs().max()
            assert relative(exact(x.double()), double) <= 1e-13
    parameters = new_parameters(train(exact, torch.randn(4, 3, 64, 96).double()))
    assert parameters
    assert [name for name in without_gradient(parameters) if not name.endswith(WITHOUT_EFFECT)] == []
    with torch.no_grad():
        before = model.eval()(images[0])
        for _, module in gated_modules(model):  # that it is the gates which keep the function
            for p in module.attn.parameters():
                p.uniform_(-1, 1)
        assert relative(model(images[0]), before) > 1e-3


@pytest.mark.parametrize('gate', TIMM_GATES)
@pytest.mark.parametrize('channels', [1, 3, 8, 17, 512])
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 3)])
def test_every_width_learns(gate, channels, size):
    """Starting from the neutral setting, all parameters get a gradient within three steps."""
    torch.manual_seed(0)
    row = GATES[gate]
    layer = create_gate(gate, channels, channels).double()
    with torch.no_grad():
        for name in row.zeros:
            layer.get_parameter(name).zero_()
    x, target = torch.randn(2, 16, channels, *size, dtype=torch.double)
    assert torch.equal(layer.eval()(x) * 2. ** row.doublings, x)
    optimizer = torch.optim.SGD(layer.train().parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    missing = set(without_gradient(dict(layer.named_parameters()))) - {'layer.conv_attn.bias'}
    if gate == 'gca' and size == (1, 1):  # a softmax over one pixel
        assert missing == {'layer.conv_attn.weight'}
    elif gate == 'ela' and channels == 1 and 1 in size:  # a group norm of one value
        assert {'layer.norm_h.bias', 'layer.norm_w.bias'}.isdisjoint(missing)
    else:
        assert missing == set()


# at least one gate per network got no gradient while narrow blocks had a single hidden channel
@pytest.mark.parametrize(('base', 'gate'), [
    pytest.param(base, gate, marks=[] if (base, gate) in QUICK_NARROW else [pytest.mark.slow])
    for base in ('ghostnet_100', 'densenet121', 'mobilenetv3_small_050', 'tf_efficientnet_lite0', 'mobilenetv2_050')
    for gate in ('se', 'se_bias', 'cbam')])
def test_narrow_blocks_learn(base, gate):
    model = timm_spa.add_attention(random_net(base, num_classes=10).double(), gate)
    train(model, torch.randn(4, 3, 64, 96).double())
    parameters = {name: p for name, p in model.named_parameters() if '.attn.' in name}
    assert parameters
    assert without_gradient(parameters) == []


@pytest.mark.parametrize('gate', ['coord', 'eca', 'strip'])
def test_by_name(gate, tmp_path):
    plain = random_net('tf_efficientnet_lite0')
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = timm.create_model(
        'gated', base='tf_efficientnet_lite0', gate=gate, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'plain.pth')))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))


def test_names_of_timms_models_are_not_split():
    """The gate `ese` is not the prefix of a model of this package, but of timm's `ese_vovnet19b_dw`."""
    assert split_gate('ese_vovnet19b_dw')[:2] == ('ese_vovnet19b_dw', 'none')
    assert split_gate('eca_resnet33ts')[:2] == ('eca_resnet33ts', 'none')
    assert split_gate('se_b_preresnet18_cifar')[:2] == ('preresnet18_cifar', 'se_b')
    for name in timm_spa.list_models():
        gate = max((gate for gate in GATES if name.startswith(f'{gate}_')), key=len, default='none')
        assert split_gate(name)[1] == gate


def randomized(module):
    """A module in eval mode whose parameters and statistics are random."""
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-0.5, 0.5)
        for b in module.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5)
    return module.eval()


@pytest.fixture
def chain():
    """All layers one after the other."""
    torch.manual_seed(0)
    return randomized(torch.nn.Sequential(*(create_gate(gate, 12, 12) for gate in TIMM_GATES)))


@pytest.mark.quick(3)
@pytest.mark.parametrize('size', slow_unless(lambda size: size == (7, 5), map(pytest.param, [(8, 8), (7, 5), (1, 1)])))
def test_other_forms(chain, size, tmp_path):
    """Script, trace by fx, compiled graph, exported graph and ONNX agree at a fixed size; so does channels_last."""
    x = torch.randn(2, 12, *size)
    with torch.no_grad():
        expected = chain(x)
        torch._dynamo.reset()
        for other in (
                torch.jit.script(chain), torch.fx.symbolic_trace(chain),
                torch.compile(chain, backend='aot_eager', fullgraph=True), torch.export.export(chain, (x,)).module()):
            torch.testing.assert_close(other(x), expected)
        torch.testing.assert_close(chain(x.to(memory_format=torch.channels_last)), expected)
        torch.onnx.export(chain, (x,), str(tmp_path / 'chain.onnx'), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / 'chain.onnx'))
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('gate', TIMM_GATES)
def test_exported_network(gate, tmp_path):
    """`export` itself compares the file with PyTorch."""
    model = timm_spa.add_attention(random_net('resnet18', num_classes=10), gate)
    with torch.no_grad():
        for _, module in gated_modules(model):
            for p in randomized(module.attn).parameters():
                p.mul_(0.2)  # larger gates amplify rounding errors
    assert export(model, tmp_path / 'model.onnx', img_size=96).path.exists()


@pytest.mark.slow
@pytest.mark.parametrize('gate', TIMM_GATES)
def test_fusing_keeps_the_gates(gate):
    """In double precision, because the feature maps of this random network are so large that gates saturate."""
    model = timm_spa.add_attention(random_net('repvgg_a0', num_classes=10), gate).double()
    for _, module in gated_modules(model):
        randomized(module.attn)
    x = torch.randn(2, 3, 64, 96).double()
    fused = timm.utils.reparameterize_model(model)
    assert len(fused.state_dict()) < len(model.state_dict())
    with torch.no_grad():
        assert relative(fused(x), model(x)) < 1e-4
