"""Warm starts: from timm's plain weights, a model that computes the same until it is trained, and then learns."""
import json
import logging
from pathlib import Path

import golden_fill
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from marks import slow_unless

import timm_spa
from timm_spa.checkpoints.warm_start import checkpoint_filter_fn
from timm_spa.layers import SpatialPyramidAttention
from timm_spa.models import GATES
from timm_spa.models._entrypoints import split_gate

WARM = [name for name in timm_spa.list_models(pretrained=True) if '.warm_' in name]
# one name per kind of block and variant
KINDS = [f'{name}.{timm.get_pretrained_cfg(name).tag}' for name in (
    'spa_resnet18', 'spa_b_resnet18', 'spa_c_resnet50', 'spa_resnext50_32x4d', 'spa_resnet50d', 'gc_resnet50',
    'spa_mobilenetv2_050', 'spa_b_mobilenetv2', 'spa_c_mobilenetv2', 'ge_mobilenetv2', 'cbam_tf_efficientnet_lite0',
    'spa_densenet121', 'spa_vgg16_bn')]


def plain_name(name):
    return timm.get_pretrained_cfg(name).hf_hub_id.removeprefix('timm/').partition('.')[0]


def random_plain_model(plain, seed=0, **kwargs):
    """A plain model with random weights, norm layers and statistics."""
    model = timm.create_model(plain, **kwargs).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for value, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.5),
                                   (module.running_mean, -0.5)):
                    value.copy_(torch.rand(value.shape, generator=generator) + low)
    return model


def warm_model(name, path, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def test_a_warm_start_for_every_tag_of_timm():
    """The default is a warm start too; gather-excite without parameters has nothing that makes it neutral."""
    for name in timm_spa.list_models():
        if name.endswith('_cifar') or name in ('gated', 'ge_resnet50'):
            continue
        plain = {'mobilenetv2': 'mobilenetv2_100'}.get(split_gate(name)[0], split_gate(name)[0])
        tags = {tag.partition('.')[2] for tag in timm.list_pretrained(f'{plain}.*')}
        assert {f'{name}.warm_{tag}' for tag in tags} == {*timm.list_pretrained(f'{name}.warm_*')}
        assert not tags or timm.get_pretrained_cfg(name).tag.startswith('warm_')
    assert not timm.list_pretrained('mobilenetv2_075.*')


@pytest.mark.parametrize('name', WARM)
def test_cfg_tells_the_truth(name):
    cfg, plain = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(name).hf_hub_id.removeprefix('timm/')
    source = timm.get_pretrained_cfg(plain)
    assert source.has_weights
    assert cfg.hf_hub_filename == 'model.safetensors'
    assert cfg.url is None
    assert cfg.license
    assert cfg.origin_url
    assert 'doi:10.1109/TMM.2021.3068576' in cfg.paper_ids
    assert plain in cfg.notes[0]
    assert 'until it is fine-tuned' in cfg.notes[0]
    for field in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation', 'test_input_size', 'test_crop_pct'):
        assert getattr(cfg, field) == getattr(source, field)


@pytest.mark.quick(7)
@pytest.mark.parametrize('name', KINDS)
def test_same_function_as_the_plain_model(name, tmp_path, caplog):
    """For random weights and statistics, through timm's own loading; one line in the log says what was done."""
    plain = random_plain_model(plain_name(name))
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    with caplog.at_level(logging.WARNING, logger='timm_spa'):
        model = warm_model(name, tmp_path / 'plain.safetensors').eval()
    lines = [r.getMessage() for r in caplog.records if r.name.startswith('timm_spa')]
    assert len(lines) == 1
    assert 'every gate neutral' in lines[0]
    images = torch.randn(2, 3, 96, 80)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))


@pytest.mark.quick(3)
@pytest.mark.parametrize('name', slow_unless(
    lambda name: not any(n in name for n in ('vgg', 'resnet50', 'resnext50')), filter(lambda n: 'spa' in n, KINDS)))
def test_every_gate_learns(name, tmp_path):
    """At the first step only the zeroed convolution has a gradient, three steps later every parameter of the gates."""
    safetensors.torch.save_file(random_plain_model(plain_name(name)).state_dict(), tmp_path / 'plain.safetensors')
    model = warm_model(name, tmp_path / 'plain.safetensors', num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(0)
    images, targets = torch.randn(8, 3, 64, 64), torch.arange(8)
    parameters = {
        f'{gate}.{n}': p for gate, m in model.named_modules() if isinstance(m, SpatialPyramidAttention)
        for n, p in m.named_parameters()}
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        if step == 0:
            for key, p in parameters.items():
                assert bool(p.grad.any()) == key.endswith('.attn.fc2.weight'), key
        optimizer.step()
    # a constant added before a norm layer over the batch has no effect: the matcher's last bias never has a gradient
    silent = [key for key, p in parameters.items() if not p.grad.any() and not key.endswith('.matcher.bn2.bias')]
    assert silent == []


def test_plain_golden_model():
    """The authors' plain ResNet-50 as a source: the warm start gives the logits that their code gave."""
    golden = json.loads((Path(__file__).parent / 'golden' / 'old_resnet50.json').read_text())
    weights = {k: torch.from_numpy(v).float() for k, v in golden_fill.weights(golden).items()}
    cfg = dict(state_dict=weights)
    images = torch.from_numpy(golden_fill.images(golden['eval']['input'])).float()
    expected = torch.tensor(golden['eval']['logits'])
    for name in ('spa_resnet50', 'spa_b_resnet50', 'spa_c_resnet50'):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg).eval()
        with torch.no_grad():
            assert ((model(images) - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.quick(8)
@pytest.mark.parametrize('plain', ['preresnet18_cifar', 'preresnet50_cifar', 'mobilenetv2_cifar', 'densenet_cifar',
                                   'vgg16_cifar'])
@pytest.mark.parametrize('gate', ['spa', 'spa_b', 'spa_c', 'se'])
def test_nets_for_small_images_and_se_too(plain, gate, tmp_path):
    """From the plain nets of this package. Their gates follow a convolution, a norm layer, or a ReLU."""
    source = random_plain_model(plain)
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'plain.safetensors')
    model = timm.create_model(f'{gate}_{plain}', num_classes=source.num_classes)
    filtered = checkpoint_filter_fn(safetensors.torch.load_file(tmp_path / 'plain.safetensors'), model, GATES)
    model.load_state_dict(filtered, strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), source(images))


@pytest.mark.parametrize('act_layer', [torch.nn.LeakyReLU, torch.nn.SiLU, torch.nn.ReLU6, torch.nn.Hardswish])
def test_activation_in_front_of_the_gate(act_layer):
    """Only those that commute with doubling keep the function; the others are refused."""
    kwargs = dict(act_layer=act_layer, mlp_ratio=1 / 64)
    source = random_plain_model('vgg16_bn', **kwargs)
    model = timm.create_model('spa_vgg16_bn', **kwargs).eval()
    if act_layer is not torch.nn.LeakyReLU:
        message = f'features.2.attn cannot be neutral after a {act_layer.__name__}, .* from scratch'
        with pytest.raises(ValueError, match=message):
            checkpoint_filter_fn(source.state_dict(), model, GATES)
        return
    model.load_state_dict(checkpoint_filter_fn(source.state_dict(), model, GATES))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), source(images))


def test_gather_excite_without_parameters_takes_the_plain_weights(tmp_path):
    """They are its own: nothing tells the two apart, and nothing is doubled."""
    source = random_plain_model('resnet50')
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'plain.safetensors')
    model = warm_model('ge_resnet50', tmp_path / 'plain.safetensors')
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_given_weights_are_left_unchanged():
    source = random_plain_model('preresnet18_cifar').state_dict()
    before = {key: value.clone() for key, value in source.items()}
    assert len(checkpoint_filter_fn(source, timm.create_model('spa_preresnet18_cifar'), GATES)) > len(before)
    assert source.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in source.items())


def test_plain_models_take_plain_weights(caplog):
    source = random_plain_model('preresnet18_cifar')
    model = timm.create_model('preresnet18_cifar')
    assert checkpoint_filter_fn(source.state_dict(), model, GATES).keys() == source.state_dict().keys()
    assert not caplog.records


def test_a_gated_checkpoint_is_loaded_as_it_is(tmp_path, caplog):
    model = timm.create_model('spa_resnet18').eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'gated.safetensors')
    with caplog.at_level(logging.WARNING):
        again = warm_model('spa_resnet18', tmp_path / 'gated.safetensors')
    assert not [r for r in caplog.records if r.name.startswith('timm_spa')]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    safetensors.torch.save_file(timm.create_model('resnet34').state_dict(), tmp_path / 'other.safetensors')
    with pytest.raises(RuntimeError, match='other.safetensors does not fit .* unexpected: layer1.2.bn1.bias'):
        warm_model('spa_resnet18', tmp_path / 'other.safetensors')


@pytest.mark.parametrize('kwargs', [dict(num_classes=5, in_chans=1), dict(num_classes=0), dict(features_only=True)])
@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_mobilenetv2_050'])
def test_adapted_models_load_too(name, kwargs, tmp_path):
    safetensors.torch.save_file(timm.create_model(plain_name(name)).state_dict(), tmp_path / 'plain.safetensors')
    model = warm_model(name, tmp_path / 'plain.safetensors', **kwargs).eval()
    with torch.no_grad():
        model(torch.randn(1, kwargs.get('in_chans', 3), 64, 64))
