"""Saving: what `add_attention` did is in config.json, and timm rebuilds the same function from it."""
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from hub_server import OWNER
from marks import slow_unless
from timm.layers import convert_sync_batchnorm
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._input import update_model_args
from timm.utils import reparameterize_model

import timm_spa
from timm_spa.checkpoints.files import WriteError
from timm_spa.checkpoints.warm_start import gated_modules
from timm_spa.hub.save import SaveError
from timm_spa.hub.verify import verify

# blocks of each kind, and arguments that reach the network
FAMILIES = {
    'resnet18': dict(gate='spa', kwargs={}),
    'mobilenetv3_small_050': dict(gate='se', kwargs=dict(in_chans=1)),
    'fbnetc_100': dict(gate='gc', kwargs=dict(num_classes=5)),  # timm changes an argument with its pretrained weights
    'convnext_atto': dict(gate='ge_conv', kwargs=dict(num_classes=5, drop_path_rate=0.1)),
    'densenet121': dict(gate='cbam', kwargs={}),
    'vgg11_bn': dict(gate='se_bias', kwargs=dict(mlp_ratio=1 / 64)),
    'repvgg_a0': dict(gate='spa', kwargs=dict(global_pool='avgmax')),
    'ghostnet_100': dict(gate='spa', kwargs=dict(global_pool='catavgmax')),
    'hrnet_w18_small': dict(gate='se', kwargs={}),
    'resnet50_gn': dict(gate='ge', kwargs=dict(num_classes=3)),
    'regnetz_005': dict(gate='spa', kwargs=dict(act_layer='relu')),
}
QUICK = ('resnet18', 'mobilenetv3_small_050', 'fbnetc_100', 'repvgg_a0')
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def randomized(model):
    """Returns a model with random parameters and statistics of norm layers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var') or tensor.ndim == 1 and name.endswith('weight'):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.1, 0.1, generator=generator)
    return model.eval()


def attached(name, gate='spa', kwargs=None, **attention):
    model = timm.create_model(name, **(kwargs or {}))
    return randomized(timm_spa.add_attention(model, gate, neutral=gate != 'ge', **attention))


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES[:, :getattr(model, 'in_chans', 3)])


def config(folder):
    return json.loads((folder / 'config.json').read_text())


WAYS = {
    'timm_spa': timm_spa.save_pretrained,
    'timm': lambda model, folder: save_for_hf(model, folder, safe_serialization=True),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', slow_unless(QUICK.__contains__, FAMILIES))
def test_round_trip(name, way, tmp_path):
    model = attached(name, **FAMILIES[name])
    WAYS[way](model, tmp_path / 'a')
    again = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    assert len(list(gated_modules(again))) == len(list(gated_modules(model))) > 0
    assert torch.equal(outputs(again), outputs(model))
    # a second round, e.g. after another fine-tune
    WAYS[way](randomized(again), tmp_path / 'b')
    assert config(tmp_path / 'b')['model_args'] == config(tmp_path / 'a')['model_args']
    assert torch.equal(outputs(timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)), outputs(again))
    assert timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True, num_classes=7).num_classes == 7


def test_the_record(tmp_path):
    model = attached('resnet18', where=['layer3.?', re.compile(r'layer4\.\d'), 'layer2.0.conv2'], pyramid_sizes=[1, 2])
    cfg = model.pretrained_cfg
    assert (cfg['architecture'], cfg['tag']) == ('gated', f'warm_{timm.get_pretrained_cfg("resnet18").tag}')
    assert cfg is model.default_cfg
    timm_spa.save_pretrained(model, tmp_path)
    saved = config(tmp_path)
    assert saved['model_args'] == dict(
        base=f'resnet18.{timm.get_pretrained_cfg("resnet18").tag}', gate='spa', pyramid_sizes=[1, 2], rd_ratio=1 / 16,
        where=['layer3.0.bn2', 'layer3.1.bn2', 'layer4.0.bn2', 'layer4.1.bn2', 'layer2.0.conv2'], in_chans=3,
        global_pool='avg')
    assert not {'tag', 'license', 'description', 'hf_hub_id', 'url'} & saved['pretrained_cfg'].keys()


def test_a_new_process_needs_the_import_only(tmp_path):
    model = attached('resnet18', kwargs=dict(num_classes=3))
    timm_spa.save_pretrained(model, tmp_path / 'saved')
    torch.save((IMAGES, outputs(model)), tmp_path / 'expected.pt')
    code = (
        'import sys, timm, timm_spa, torch; images, expected = torch.load(sys.argv[1]); torch.set_grad_enabled(False); '
        'print(torch.equal(timm.create_model(sys.argv[2], pretrained=True).eval()(images), expected))')
    done = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'expected.pt', f'local-dir:{tmp_path / "saved"}'], capture_output=True,
        text=True, env=dict(os.environ, HF_HUB_OFFLINE='1'))
    assert done.stdout == 'True\n', done.stderr


def replace_head(model):
    model.fc = nn.Linear(model.fc.in_features, 7)


def remove_head(model):
    model.fc = nn.Identity()


def reset_head(model):
    model.reset_classifier(7, 'avgmax')


HEADS = {reset_head: 7, replace_head: 7, remove_head: 0}


@pytest.mark.parametrize(('change', 'attach_first', 'way'), [
    (change, first, way) for change in HEADS for first in (False, True) for way in WAYS
    if not (way == 'timm' and first and change is not reset_head)])  # timm itself does not see that one was assigned
def test_a_changed_head(change, attach_first, way, tmp_path):
    model = timm.create_model('resnet10t', in_chans=1)
    for step in (timm_spa.add_attention, change)[::1 if attach_first else -1]:
        step(model)
    WAYS[way](randomized(model), tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.num_classes == HEADS[change]
    assert torch.equal(outputs(again), outputs(model))


def test_of_a_local_file_and_of_a_saved_model(tmp_path):
    """Neither the path of the machine nor the former architecture is in config.json."""
    plain = randomized(timm.create_model('resnet10t', num_classes=4))
    torch.save(plain.state_dict(), tmp_path / 'w.pth')
    overlay = dict(file=str(tmp_path / 'w.pth'), num_classes=4, mean=(0.1, 0.2, 0.3))
    model = timm.create_model('resnet10t', pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    timm_spa.save_pretrained(timm_spa.add_attention(model), tmp_path / 'a')
    assert str(tmp_path) not in (tmp_path / 'a' / 'config.json').read_text()
    again = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    assert torch.equal(outputs(again), outputs(plain)), 'neutral'
    assert again.pretrained_cfg['mean'] == [0.1, 0.2, 0.3]
    # a plain model from a folder
    timm_spa.save_pretrained(plain, tmp_path / 'plain', class_names=['ant', 'bee', 'cat', 'dog'])
    model = timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True)
    timm_spa.save_pretrained(randomized(timm_spa.add_attention(model, 'se')), tmp_path / 'b')
    again = timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)
    assert torch.equal(outputs(again), outputs(model))
    assert again.pretrained_cfg['label_names'] == ['ant', 'bee', 'cat', 'dog']
    assert config(tmp_path / 'b')['model_args']['base'].partition('.')[0] == 'resnet10t'


def test_models_by_name(tmp_path):
    """The function is not for attached models alone."""
    model = randomized(timm.create_model('spa_mobilenetv2_cifar', pyramid_sizes=(1, 2), num_classes=3))
    timm_spa.save_pretrained(model, tmp_path / 'a', ['ant', 'bee', 'cat'])
    x = torch.randn(2, 3, 32, 32)
    again = timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert verify(tmp_path / 'a').problems == ['README.md is missing']
    without = timm_spa.add_attention(timm.create_model('gated', gate='none', base='resnet10t'), 'se')
    timm_spa.save_pretrained(randomized(without), tmp_path / 'b')
    assert torch.equal(
        outputs(timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)), outputs(without))
    wrapped = torch.nn.DataParallel(without)
    timm_spa.save_pretrained(wrapped, tmp_path / 'b')


def test_trained_with_other_norms_and_dropout(tmp_path):
    """What timm does to a model for training does not change what is saved."""
    model = timm_spa.add_attention(timm.create_model('resnet10t', drop_path_rate=0.1, drop_rate=0.2))
    model = convert_sync_batchnorm(model)
    timm_spa.save_pretrained(randomized(model), tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(outputs(again), outputs(model))


def with_another_activation(model):
    model.layer1[0].act2 = nn.GELU()


@pytest.mark.parametrize(('change', 'message'), [
    (with_another_activation, r'1 layers differ from the gated that config.json describes: layer1.0.act2 \(GELU'),
    (lambda model: setattr(model, 'fc', nn.Sequential(nn.Linear(512, 9), nn.Linear(9, 4))),
     'has tensors .*fc.0.weight'),
    (lambda model: update_model_args(model, gate=nn.Sigmoid), 'argument gate=Sigmoid, .* add the same gate before'),
    (lambda model: update_model_args(model, act_layer=nn.SiLU), "argument act_layer=SiLU, .* e.g. act_layer='silu'"),
    (lambda model: update_model_args(model, colour=1), 'cannot be created from its config.json .*colour'),
    (lambda model: nn.init.constant_(model.bn1.weight, float('nan')), 'values that are not finite: bn1.weight'),
])
def test_what_config_json_cannot_describe(change, message, tmp_path):
    model = attached('resnet10t').eval()
    change(model)
    (tmp_path / 'saved').mkdir()
    with pytest.raises(SaveError, match=message):
        timm_spa.save_pretrained(model, tmp_path / 'saved')
    assert not list((tmp_path / 'saved').iterdir())


def test_what_is_not_a_whole_model_of_timm(tmp_path):
    extractor = timm_spa.add_attention(timm.create_model('resnet10t', features_only=True))
    assert extractor.pretrained_cfg['architecture'] == 'resnet10t', 'its names are not those of the whole model'
    with pytest.raises(SaveError, match='FeatureListNet cannot be saved: it is a feature extractor'):
        timm_spa.save_pretrained(extractor, tmp_path)
    own = timm_spa.add_attention(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), where='1')
    with pytest.raises(SaveError, match='Sequential cannot be saved: .* models of timm only'):
        timm_spa.save_pretrained(own, tmp_path)
    with pytest.raises(SaveError, match='2 class names were given, but the model has 1000 classes'):
        timm_spa.save_pretrained(attached('resnet10t'), tmp_path, ['ant', 'bee'])
    fused = reparameterize_model(timm.create_model('spa_mobilenetv2_cifar').eval())
    with pytest.raises(SaveError, match='save before fusing'):
        timm_spa.save_pretrained(fused, tmp_path)
    with pytest.raises(ValueError, match='has gates already. .* where takes the names of several modules'):
        timm_spa.add_attention(attached('resnet10t', where='layer4.?'), where='layer3.?')
    assert not list(tmp_path.iterdir())


def test_an_existing_folder(tmp_path):
    model = attached('resnet10t')
    (tmp_path / 'config.json').write_text('{"mine": 1}')
    with pytest.raises(WriteError, match='config.json exists already. Add --overwrite|overwrite'):
        timm_spa.save_pretrained(model, tmp_path)
    timm_spa.save_pretrained(model, tmp_path, overwrite=True)
    (tmp_path / 'notes.txt').write_text('mine')
    timm_spa.save_pretrained(randomized(model), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors', 'notes.txt']


def test_features_of_a_saved_model(tmp_path):
    model = attached('resnet10t')
    timm_spa.save_pretrained(model, tmp_path)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    with torch.no_grad():
        assert torch.equal(features(IMAGES)[-1], model.forward_features(IMAGES))


def test_the_hub(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', OWNER)
    model = attached('resnet10t', 'cbam', dict(num_classes=3, in_chans=1))
    published = timm_spa.push_to_hub(model, 'org/mine', license='mit', class_names=['ant', 'bee', 'cat'])
    assert published.changed
    assert sorted(hub.files('org/mine')) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    card = hub.files('org/mine')['README.md'].decode()
    assert 'license: mit' in card
    assert 'resnet10t.c3_in1k of timm with the convolutional block attention module.' in card
    again = timm.create_model('hf-hub:org/mine', pretrained=True)
    assert torch.equal(outputs(again), outputs(model))
    assert again.pretrained_cfg['label_names'] == ['ant', 'bee', 'cat']
    assert verify('org/mine').problems == []
    assert not timm_spa.push_to_hub(model, 'org/mine', license='mit', class_names=['ant', 'bee', 'cat']).changed
    # timm's own function
    push_to_hf_hub(model, 'org/timms', safe_serialization=True)
    assert torch.equal(outputs(timm.create_model('hf-hub:org/timms', pretrained=True)), outputs(model))
    with pytest.raises(SaveError, match='2 class names'):
        timm_spa.push_to_hub(model, 'org/none', license='mit', class_names=['ant', 'bee'])
    assert 'org/none' not in hub.repositories


def test_the_names_of_the_package():
    """`import timm_spa` loads no module of the Hub, as another test checks; the names are there all the same."""
    assert {'push_to_hub', 'save_pretrained'} <= set(dir(timm_spa))
    with pytest.raises(AttributeError, match="has no attribute 'save'"):
        timm_spa.save  # noqa: B018
