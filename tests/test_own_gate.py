"""Attention layers of the user's own as gates: the same function at the start, whatever the layer, and clear errors."""
import copy
import functools
import pickle

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_add_attention import random_net, relative
from timm.layers import NonLocalAttn, create_attn
from timm.optim import param_groups_weight_decay

import timm_spa
from timm_spa._errors import TimmSpaError
from timm_spa.checkpoints.warm_start import gated_modules
from timm_spa.layers import OwnGate
from timm_spa.models import create_gate

BASES = [
    'resnet18', 'regnety_002', 'convnext_atto', 'ghostnet_100', 'repvgg_a0', 'mobilenetv3_small_050', 'starnet_s1',
    'cs3darknet_s', 'ese_vovnet19b_dw', 'rexnet_100', 'mobilenetv4_conv_small', 'densenet121', 'vgg11_bn']


class Depthwise(nn.Module):
    """The gate of the documentation, with batch norm."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.norm(self.conv(x)).sigmoid()


class SelfAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


class SimAM(nn.Module):
    """Without parameters and without a neutral setting."""

    def forward(self, x):
        distance = (x - x.mean((2, 3), keepdim=True)).square()
        energy = distance / (4 * distance.mean((2, 3), keepdim=True) + 1e-4) + 0.5
        return x * energy.sigmoid()


def sim_am(channels):
    return SimAM()


LAYERS = {
    'depthwise': Depthwise, 'self-attention': SelfAttention, 'simam': sim_am,
    'ge': functools.partial(create_attn, 'ge', use_mlp=False), 'non-local': NonLocalAttn,
    'replaced': lambda channels: nn.Conv2d(channels, channels, 1)}
IMAGES = torch.randn(4, 3, 65, 96, generator=torch.Generator().manual_seed(0))


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[..., :64, :64]), torch.arange(len(IMAGES)) % 2).backward()
        optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if '.attn.scale' in name or '.attn.layer.' in name}


def trained(base='resnet18', gate=Depthwise):
    model = timm_spa.add_attention(random_net(base, num_classes=10), gate)
    train(model)
    for _, module in gated_modules(model):
        nn.init.uniform_(module.attn.scale, 0.2, 0.8)
    return model.eval()


@pytest.mark.quick(8)
@pytest.mark.parametrize(('base', 'layer'), [
    pytest.param(base, layer, marks=[] if i % len(LAYERS) == j else [pytest.mark.slow])
    for i, base in enumerate(BASES) for j, layer in enumerate(LAYERS)])
def test_same_outputs_until_trained(base, layer):
    """Bit for bit. The scales get a gradient first, the layers from the second step on.

    The other way round for timm's non-local layer, which returns its input until it is trained.
    """
    model = random_net(base, num_classes=10)
    with torch.no_grad():
        expected = model(IMAGES)
        timm_spa.add_attention(model, LAYERS[layer])
        assert torch.equal(model(IMAGES), expected)
    first = train(copy.deepcopy(model), steps=1)
    assert all(grad is not None for grad in first.values())
    at_first = {name for name, grad in first.items() if grad.any()}
    if layer == 'non-local':
        assert {name.rpartition('.attn.')[2] for name in at_first} == {'layer.norm.weight', 'layer.norm.bias'}
    else:
        assert at_first == {name for name in first if name.endswith('.scale')}
    grads = train(model, steps=3)
    # the shift of the keys does not change a softmax, and that of a norm layer's input not its output
    without_effect = ('in_proj_bias', '.layer.conv.bias', '.layer.t.bias', '.layer.p.bias')
    assert [name for name, grad in grads.items() if not grad.any() and not name.endswith(without_effect)] == []
    with torch.no_grad():
        before = model.eval()(IMAGES)
        for _, module in gated_modules(model):
            module.attn.scale.uniform_(0.2, 0.8)
            for p in module.attn.layer.parameters():
                p.uniform_(-0.1, 0.1)
        assert relative(model(IMAGES), before) > 1e-3


def test_as_initialized_it_is_the_layer():
    torch.manual_seed(0)
    gate, x = create_gate(Depthwise, 8, 8).eval(), torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(gate(x), gate.layer(x))
    model = timm_spa.add_attention(random_net('resnet18'), Depthwise, neutral=False)
    assert all((module.attn.scale == 1).all() for _, module in gated_modules(model))


def test_affine_parameters_are_not_needed():
    model = random_net('resnet18')
    model.layer2[0].bn2 = nn.BatchNorm2d(128, affine=False)
    with torch.no_grad():
        expected = model.eval()(IMAGES)
        assert torch.equal(timm_spa.add_attention(model, Depthwise)(IMAGES), expected)


def test_copies_and_state_dict():
    model = trained()
    again = timm_spa.add_attention(random_net('resnet18', num_classes=10), Depthwise)
    again.load_state_dict(model.state_dict(), strict=True)
    assert 'layer1.0.bn2.drop.attn.scale' in model.state_dict()
    assert 'layer1.0.bn2.drop.attn.layer.conv.weight' in model.state_dict()
    with torch.no_grad():
        for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IMAGES), model(IMAGES))
    groups = param_groups_weight_decay(model, 0.05)
    scales = {id(p) for name, p in model.named_parameters() if name.endswith('.scale')}
    assert scales <= {id(p) for group in groups if not group['weight_decay'] for p in group['params']}


@pytest.mark.parametrize('base', ['resnet18', 'repvgg_a0'])
def test_script_trace_and_fused_form(base):
    model = trained(base)
    with torch.no_grad():
        for other in (torch.jit.script(model), torch.fx.symbolic_trace(model),
                      timm.utils.reparameterize_model(copy.deepcopy(model))):
            assert relative(other(IMAGES), model(IMAGES)) < 1e-4


@pytest.mark.parametrize('layer', ['depthwise', 'simam', pytest.param('non-local', marks=pytest.mark.slow)])
def test_exported_and_compiled(layer, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), create_gate(LAYERS[layer], 8, 8)).eval()
    nn.init.uniform_(model[1].scale)
    x = IMAGES[:1]
    torch._dynamo.reset()
    with torch.no_grad():
        for other in (torch.compile(model, backend='aot_eager', fullgraph=True),
                      torch.export.export(model, (x,)).module()):
            assert relative(other(x), model(x)) < 1e-4
        torch.onnx.export(model, (x,), str(tmp_path / 'model.onnx'), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(tmp_path / 'model.onnx'))
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert relative(torch.from_numpy(y), model(x)) < 1e-4


def test_distributed_without_find_unused_parameters():
    """torch raises an error in the step after one in which a parameter was not used."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = timm_spa.add_attention(random_net('resnet18', num_classes=10), Depthwise)
        grads = train(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert [name for name, grad in grads.items() if not grad.any() and not name.endswith('.conv.bias')] == []


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_type_of_the_feature_map(dtype):
    gate = create_gate(Depthwise, 8, 8).eval()
    with torch.autocast('cpu', dtype), torch.no_grad():
        for x in (torch.randn(2, 8, 5, 7), torch.randn(2, 8, 5, 7, dtype=dtype)):
            assert gate(x).dtype == x.dtype


def test_type_and_device_of_the_model():
    model = timm_spa.add_attention(timm.create_model('resnet18', device='meta').bfloat16(), Depthwise)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize('features_only', [False, True])
def test_in_create_model(features_only, tmp_path):
    """From weights of the plain network and from its own."""
    plain = random_net('resnet18')
    for path, model in ((tmp_path / 'plain.pth', plain), (tmp_path / 'own.pth', trained())):
        torch.save(model.state_dict(), path)
        kwargs = dict(
            features_only=features_only, num_classes=model.num_classes, pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path), num_classes=model.num_classes))
        if features_only:
            kwargs.pop('num_classes')
        made = timm.create_model('gated', base='resnet18', gate=Depthwise, **kwargs).eval()
        with torch.no_grad():
            y = made(IMAGES)[-1] if features_only else made(IMAGES)
            assert torch.equal(y, model.forward_features(IMAGES) if features_only else model(IMAGES))


SHARED = nn.Conv2d(1, 1, 1)


class Broken(nn.Module):
    def __init__(self, channels, width):
        super().__init__()


@pytest.mark.parametrize(('gate', 'message'), [
    (Depthwise(64), 'gate is a module, a Depthwise, but each block needs its own.*gate=Depthwise'),
    (3, 'gate must be the name of a gate, or a class or function .* got 3'),
    (['spa'], r"got \['spa'\]"),
    (Broken, r"Broken could not be created for 64 channels: TypeError: .*width.*only required argument"),
    (lambda channels: 'spa', '<lambda> returned str for 64 channels, not a module'),
    (lambda channels: nn.Conv2d(channels, 2 * channels, 1), r'keep the shape .*\[1, 64, 4, 8\], got \[1, 128, 4, 8\]'),
    (lambda channels: nn.Conv2d(channels, channels, 3), r'got \[1, 64, 2, 6\]'),
    (lambda channels: nn.MaxPool2d(1, return_indices=True), 'must return a tensor, got .*tuple'),
    (lambda channels: nn.ReLU(inplace=True), 'writes to its input.*inplace=False'),
    (lambda channels: nn.Sequential(nn.ChannelShuffle(1), SHARED), 'shares parameters or buffers between blocks'),
])
def test_errors_leave_the_model_unchanged(gate, message):
    model = timm.create_model('resnet18')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TimmSpaError, match=message) as caught:
        timm_spa.add_attention(model, gate)
    assert isinstance(caught.value, ValueError)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_shape_is_checked_in_every_call():
    """A layer may fail on the small feature map of the first check, and change the shape of others."""
    class OnlyLarge(nn.Conv2d):
        def forward(self, x):
            if x.shape[2] < 16:
                raise RuntimeError('too small')
            return super().forward(x)

    gate = create_gate(lambda channels: OnlyLarge(channels, channels, 3), 4, 4)
    with pytest.raises(ValueError, match=r'keep the shape of its feature map, \[1, 4, 16, 16\], got \[1, 4, 14, 14\]'):
        gate(torch.randn(1, 4, 16, 16))


def test_statistics_are_not_touched_by_the_first_check():
    model = timm_spa.add_attention(timm.create_model('resnet18').train(), Depthwise)
    norms = [module.attn.layer.norm for _, module in gated_modules(model)]
    assert all(norm.training and norm.num_batches_tracked == 0 for norm in norms)
    assert all(isinstance(module.attn, OwnGate) for _, module in gated_modules(model))
