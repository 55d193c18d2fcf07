"""`fuse()` of the blocks, as timm's `reparameterize_model` asks for it: the same function in another form."""
import copy
import logging

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from marks import slow_unless
from test_models import ALSO_SLOW, MODELS
from test_one_form import gates, images_of, make_model, rel
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model

from timm_spa.layers import FusedBranch, SqueezeExcite
from timm_spa.layers.comparison_gates import SelfGate
from timm_spa.models import create_gate

FUSED = [
    name for name in MODELS
    if ('_resnet' in name or 'mobilenetv2' in name) and name.split('_')[0] in ('spa', 'se')]
# one of each block, variant and place of the pooling
KINDS = (
    'spa_resnet18', 'spa_c_resnet18', 'spa_resnet50', 'spa_b_resnet50', 'spa_c_resnet50', 'spa_mobilenetv2_050',
    'spa_c_mobilenetv2', 'se_mobilenetv2', 'spa_mobilenetv2_cifar', 'se_mobilenetv2_cifar')

@pytest.mark.quick(8)
@pytest.mark.parametrize('name', [case for case in ALSO_SLOW if case.values[0] in FUSED])
@torch.no_grad()
def test_fused_model_is_the_model(name):
    """In double precision, at two sizes, one odd; every block is fused, and no norm layer of a branch is left."""
    model = make_model(name).double()
    other = reparameterize_model(model)
    branches = [m for m in other.modules() if isinstance(m, FusedBranch)]
    assert len(branches) == len(gates(model))
    assert not [m for b in branches for m in b.modules() if isinstance(m, nn.BatchNorm2d)]
    images = images_of(name).double()
    for x in (images, images[:, :, :-7, 3:]):
        assert rel(other(x), model(x)) < 1e-10

@pytest.mark.parametrize('name', [
    'ge_resnet50', 'cbam_mobilenetv2', 'mobilenetv2_cifar', 'spa_b_preresnet18_cifar', 'spa_densenet_cifar',
    'spa_vgg16_cifar'])
@torch.no_grad()
def test_other_models_stay_as_they_are(name, caplog):
    model, images = make_model(name), images_of(name)
    other = reparameterize_model(model)
    assert not [m for m in other.modules() if isinstance(m, FusedBranch)]
    assert torch.equal(other(images), model(images))
    if hasattr(next(iter(m for m in model.modules() if hasattr(m, 'attn')), None), 'fuse'):
        assert 'has no fused form' in caplog.text

@pytest.mark.quick(5)
@pytest.mark.parametrize('name', KINDS)
@torch.no_grad()
def test_same_in_every_mode(name):
    model, images = reparameterize_model(make_model(name)).requires_grad_(True), images_of(name)
    with torch.enable_grad():
        expected = model(images)
        expected.sum().backward()
    unread = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unread, 'a parameter that no forward reads'
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(images), expected)


@pytest.mark.parametrize('name', slow_unless(lambda name: name == 'spa_resnet18', KINDS))
@torch.no_grad()
def test_works_with_tools(name, tmp_path):
    """Saves and loads, copies, changes dtype and layout, scripts, compiles and exports."""
    model, images = reparameterize_model(make_model(name)), images_of(name)
    expected = model(images)
    again = reparameterize_model(timm.create_model(name).eval())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert rel(last, expected) < 1e-4
    assert rel(model.double()(images.double()), expected) < 1e-4
    model.float()
    assert rel(torch.jit.script(model)(images), expected) < 1e-4
    torch._dynamo.reset()
    assert rel(torch.compile(model, fullgraph=True, backend='aot_eager')(images), expected) < 1e-4
    path, axes = str(tmp_path / 'model.onnx'), {0: 'batch', 2: 'height', 3: 'width'}
    torch.onnx.export(model, (images,), path, dynamo=False, input_names=['x'], dynamic_axes=dict(x=axes))
    session = onnxruntime.InferenceSession(path)
    for x in (images, images[:1, :, :-7, 3:].contiguous()):
        y, = session.run(None, {'x': x.numpy()})
        assert rel(torch.from_numpy(y), model(x)) < 1e-4

@pytest.mark.parametrize('name', ['spa_resnet50', 'spa_mobilenetv2_050'])
@torch.no_grad()
def test_features(name):
    model, images = make_model(name, features_only=True), images_of(name)
    for a, b in zip(reparameterize_model(model)(images), model(images), strict=True):
        assert rel(a, b) < 1e-4
    plain = make_model(name)
    maps = (m.forward_intermediates(images, intermediates_only=True) for m in (reparameterize_model(plain), plain))
    for a, b in zip(*maps, strict=True):
        assert rel(a, b) < 1e-4


def replace_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x)

REFUSALS = {
    'in training mode': lambda b: b.train(),
    'bn3 is in training mode': lambda b: b.bn3.train(),
    'conv3 is wrapped or has hooks': lambda b: b.conv3.register_forward_hook(lambda m, args, out: out * 2),
    'attn is wrapped or has hooks': lambda b: b.attn.register_forward_pre_hook(lambda m, args: None),
    'attn.fc1 is wrapped or has hooks': lambda b: replace_forward(b.attn.fc1),
    'conv1 is wrapped or has hooks': lambda b: nn.utils.parametrizations.weight_norm(b.conv1),
    'conv2 is wrapped or has hooks': lambda b: nn.utils.weight_norm(b.conv2),
    'no convolution in front of it': lambda b: setattr(b, 'conv3', nn.Sequential(b.conv3, nn.ReLU()).eval()),
    'Conv2d, GroupNorm is not a convolution': lambda b: setattr(b, 'bn3', nn.GroupNorm(1, 256).eval()),
    'Conv2d, BatchNormAct2d is not a convolution': lambda b: setattr(b, 'bn3', BatchNormAct2d(256).eval()),
    'no stored statistics': lambda b: setattr(b, 'bn2', nn.BatchNorm2d(64, track_running_stats=False).eval()),
    'CbamModule has no fused form': lambda b: setattr(b, 'attn', create_gate('cbam', 256, 64).eval()),
    'Dropout has no fused form': lambda b: setattr(b, 'attn', SelfGate(nn.Dropout()).eval()),
}

@pytest.mark.parametrize('reason', REFUSALS)
def test_refuses_what_it_cannot_do(reason, caplog):
    """The block is left as it is, with what was put on it, and the others are fused."""
    torch.manual_seed(0)
    model = timm.create_model('spa_resnet50').eval()
    REFUSALS[reason](model.layer1[0])
    with caplog.at_level(logging.WARNING):
        other = reparameterize_model(model, inplace=True)
    assert type(other.layer1[0]).__name__ == 'GatedBottleneck'
    assert 'GatedBottleneck is unchanged by fuse()' in caplog.text
    assert reason in caplog.text
    assert len(caplog.records) == 1
    assert isinstance(other.layer1[1], FusedBranch)

@pytest.mark.parametrize('variant', 'abc')
@torch.no_grad()
def test_squeeze_excite_in_the_same_place(variant):
    model = timm.create_model('spa_resnet50').eval()
    for block in (m for m in model.modules() if hasattr(m, 'attn')):
        block.attn = SqueezeExcite(block.conv3.out_channels, block.conv1.in_channels, variant).eval()
    x = torch.randn(2, 3, 64, 64)
    assert rel(reparameterize_model(model)(x), model(x)) < 1e-4
