"""Whether a checkpoint fits a model depends on its tensors alone: not on num_classes, in_chans or features_only."""
import ast
import json
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_unless
from safetensors.torch import load_file, save_file
from test_add_attention import random_net, relative
from test_gated import trained

import timm_spa
from timm_spa._errors import TimmSpaError
from timm_spa.checkpoints.warm_start import gate_weights
from timm_spa.models._block_types import BLOCK_TYPES
from timm_spa.models._timm_bases import FILTERS

# a model, the plain model whose weights start it, and a larger network of the same family
MODELS = {
    'gated': ('mobilenetv3_small_050', 'mobilenetv3_small_075'),
    'spa_mobilenetv4_conv_small': ('mobilenetv4_conv_small', 'mobilenetv4_conv_medium'),
    'spa_resnet18': ('resnet18', 'resnet34'),
    'spa_mobilenetv2_050': ('mobilenetv2_050', 'mobilenetv2_100'),
}
QUICK = slow_unless(lambda name: name in ('gated', 'spa_mobilenetv2_050'), MODELS)
WAYS = {
    'alone': {},
    'classes': dict(num_classes=10),
    'no classifier': dict(num_classes=0),
    'grey': dict(in_chans=1),
    'features': dict(features_only=True),
    'features of grey images': dict(features_only=True, in_chans=1),
    'train.py --pretrained-path': dict(overlay=dict(num_classes=-1)),
    'the same with classes': dict(overlay=dict(num_classes=-1), num_classes=10),
}
QUICK_WAYS = slow_unless(lambda way: way in ('classes', 'features', 'train.py --pretrained-path'), WAYS)


def loaded(name, file, overlay=None, **kwargs):
    base = dict(base=MODELS[name][0]) if name == 'gated' else {}
    overlay = dict(file=str(file), source='', **(overlay or {}))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **base, **kwargs)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Files of tensors for each model: its own, the plain model's, and some that do not fit."""
    folder = tmp_path_factory.mktemp('files')

    def written(name):
        base, larger = MODELS[name]
        torch.manual_seed(0)
        own = timm.create_model(name, **(dict(base=base) if name == 'gated' else {}))
        with torch.no_grad():
            for key, value in own.state_dict().items():
                if key in gate_weights(own) and value.is_floating_point():
                    value.uniform_(0.1, 0.5)
        own, plain = own.state_dict(), random_net(base).state_dict()
        # behind the layers that timm adapts, for every model the first block
        block = next(key for key in plain if key.endswith('weight') and ('layer1.0.' in key or 'blocks.0.0.' in key))
        gate = next(key for key in own if '.attn.fc1' in key)
        stem = next(iter(plain))
        other = 'neutral gc', {
            key: value for key, value in timm_spa.add_attention(random_net(base), 'gc').state_dict().items()}
        return {
            'own': own,
            'plain': plain,
            other[0]: other[1],
            'larger': timm.create_model(larger).state_dict(),
            'own without a tensor': {key: value for key, value in own.items() if key != block},
            'own without a tensor of a gate': {key: value for key, value in own.items() if key != gate},
            'own without the first convolution': {key: value for key, value in own.items() if key != stem},
            'own with fewer filters in the first convolution': dict(own, **{stem: own[stem][:-1]}),
            'own with a tensor of another shape': dict(own, **{block: own[block][:-1]}),
            'plain without a tensor': {key: value for key, value in plain.items() if key != block},
            'plain without the first convolution': {key: value for key, value in plain.items() if key != stem},
            'plain with a tensor more': dict(plain, **{'layer9.weight': torch.ones(3)}),
        }

    made = {}

    def get(name, kind):
        if name not in made:
            made[name] = {}
            for i, (of, tensors) in enumerate(written(name).items()):
                made[name][of] = folder / f'{name}{i}.safetensors'
                save_file({key: value.contiguous().clone() for key, value in tensors.items()}, made[name][of])
        return made[name][kind]

    return get


@pytest.mark.parametrize('way', QUICK_WAYS)
@pytest.mark.parametrize('name', QUICK)
def test_what_fits(name, way, files):
    """The model's own file is loaded as it is, and the plain model's so that gates are neutral."""
    for kind in ('own', 'plain'):
        tensors = load_file(files(name, kind))
        model = loaded(name, files(name, kind), **WAYS[way])
        cfg = timm.get_pretrained_cfg(MODELS[name][0])
        flat = {key.replace('.', '_'): value for key, value in tensors.items()}
        for key, value in model.state_dict().items():
            expected = flat.get(key.replace('.', '_'))
            if key.startswith(f'{cfg.classifier}.') and way not in ('alone', 'grey'):
                assert not torch.equal(value, expected) or 'bias' in key
            elif key == f'{cfg.first_conv}.weight' and 'in_chans' in WAYS[way]:
                assert torch.allclose(value, expected.sum(1, keepdim=True), atol=1e-6)
            elif kind == 'own':
                assert torch.equal(value, expected), key
            elif '.attn.' in key:
                assert not key.endswith('fc2.weight') or not value.any(), key
            else:
                assert torch.equal(value, expected) or torch.equal(value, expected * 2), key


WRONG = {
    'neutral gc': 'unexpected: .*mlp_scale|unexpected: .*conv_attn',
    'larger': 'wrong shape',
    'own without a tensor': '1 missing: (?:layer1|blocks).0',
    'own without a tensor of a gate': '1 missing: .*attn.fc1.weight',
    'own without the first convolution': '1 missing: conv',
    'own with fewer filters in the first convolution': '1 of the wrong shape: conv',
    'own with a tensor of another shape': r'1 of the wrong shape: (?:layer1|blocks)\.0.*expected',
    'plain without a tensor': '1 missing: (?:layer1|blocks).0',
    'plain without the first convolution': '1 missing: conv',
    'plain with a tensor more': '1 unexpected: layer9.weight',
}


@pytest.mark.quick(3)
@pytest.mark.parametrize('way', QUICK_WAYS)
@pytest.mark.parametrize('name', QUICK)
def test_what_does_not_fit(name, way, files, caplog):
    for kind, message in WRONG.items():
        with pytest.raises(RuntimeError, match=f'{files(name, kind).name} does not fit {name}; tensors .*({message})'):
            loaded(name, files(name, kind), **WAYS[way])
    assert not caplog.records, 'no warm start is announced'
    with pytest.raises(TimmSpaError):
        loaded(name, files(name, 'larger'), **WAYS[way])


@pytest.mark.quick(3)
@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=10), dict(features_only=True)])
@pytest.mark.parametrize('name', ['gated', 'spa_mobilenetv2_050'])
def test_a_folder(name, kwargs, files, tmp_path):
    cfg = timm.get_pretrained_cfg(MODELS[name][0]).to_dict()
    config = dict(architecture=name, num_classes=1000, pretrained_cfg=cfg)
    if name == 'gated':
        config['model_args'] = dict(base=MODELS[name][0])
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for kind, message in WRONG.items():
        save_file(load_file(files(name, kind)), tmp_path / 'model.safetensors')
        with pytest.raises(RuntimeError, match=f'does not fit {name}; tensors .*({message})'):
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **kwargs)
    for kind in ('own', 'plain'):
        save_file(load_file(files(name, kind)), tmp_path / 'model.safetensors')
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **kwargs)


@pytest.mark.parametrize('name', ['gated', 'spa_mobilenetv2_050'])
def test_the_classifier(name, files, tmp_path):
    """It may be missing where it is not needed. Otherwise the model would answer at random."""
    for kind in ('own', 'plain'):
        tensors = load_file(files(name, kind))
        ten = {key: value[:10] if key.startswith('classifier') else value for key, value in tensors.items()}
        none = {key: value for key, value in tensors.items() if not key.startswith('classifier')}
        save_file(ten, tmp_path / 'ten.safetensors')
        save_file(none, tmp_path / 'none.safetensors')
        for file in ('none', 'ten'):
            with pytest.raises(RuntimeError, match=f'{file}.safetensors does not fit {name};.* 2 .*classifier.weight'):
                loaded(name, tmp_path / f'{file}.safetensors')
            for kwargs in (
                    dict(num_classes=7), dict(num_classes=0), dict(num_classes=7, in_chans=1), dict(features_only=True),
                    *(dict(overlay=dict(num_classes=n)) for n in (-1, 0)),
                    dict(overlay=dict(num_classes=0), num_classes=3)):
                loaded(name, tmp_path / f'{file}.safetensors', **kwargs)
        model = loaded(name, tmp_path / 'ten.safetensors', overlay=dict(num_classes=10))
        assert torch.equal(model.classifier.weight, ten['classifier.weight'])
        with pytest.raises(RuntimeError, match='conv_stem'):
            loaded(name, tmp_path / 'ten.safetensors', overlay=dict(num_classes=10, input_size=(1, 64, 64)))


def test_old_files_without_counters(files, tmp_path):
    for name in ('gated', 'spa_mobilenetv2_050'):
        for kind in ('own', 'plain'):
            tensors = {k: v for k, v in load_file(files(name, kind)).items() if not k.endswith('num_batches_tracked')}
            torch.save(tensors, tmp_path / 'old.pth')
            loaded(name, tmp_path / 'old.pth')
            loaded(name, tmp_path / 'old.pth', features_only=True)


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model):
    return model.eval()(IMAGES)


@pytest.mark.quick(1)
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'getter'])
def test_an_extractor_that_ends_before_the_first_gate(feature_cls, tmp_path):
    kwargs = dict(features_only=True, out_indices=(0,), feature_cls=feature_cls)
    model = timm.create_model('gated', base='resnet18', **kwargs)
    maps = outputs(model)
    assert [tuple(m.shape) for m in (maps.values() if isinstance(maps, dict) else maps)] == [(2, 64, 32, 32)]
    assert not [name for name, module in model.named_modules() if hasattr(module, 'gate_name')]
    whole, plain = trained('resnet18'), random_net('resnet18', **kwargs)
    for kind, weights in (('own', whole.state_dict()), ('plain', random_net('resnet18').state_dict())):
        save_file(weights, tmp_path / f'{kind}.safetensors')
        load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / f'{kind}.safetensors')))
        model = timm.create_model('gated', base='resnet18', **kwargs, **load)
        maps, expected = (list(m.values()) if isinstance(m, dict) else m
                          for m in (outputs(model), outputs(plain)))
        assert torch.equal(maps[0], expected[0])
        del weights['layer4.1.conv2.weight']  # of a layer that the extractor does not have
        save_file(weights, tmp_path / f'{kind}.safetensors')
        with pytest.raises(RuntimeError, match='1 missing: layer4.1.conv2.weight'):
            timm.create_model('gated', base='resnet18', **kwargs, **load)


@pytest.mark.parametrize(('base', 'where', 'expected'), [
    ('resnet18', ['layer1.0', 'layer4.?'], 1), ('convnext_atto', ['stages.[03].blocks.0'], 1), ('resnet18', None, 4)])
def test_gates_of_a_part_of_the_network(base, where, expected):
    indices = (0, 1) if base == 'convnext_atto' else (0, 1, 2)
    model = timm.create_model('gated', base=base, where=where, features_only=True, out_indices=indices)
    assert len({name for name, module in model.named_modules() if hasattr(module, 'gate_name')}) == expected
    with pytest.raises(ValueError, match="No module of the model matches 'layer9'"):
        timm.create_model('gated', base=base, where='layer9', features_only=True, out_indices=(0,))


@pytest.mark.quick(4)
@pytest.mark.parametrize(('base', 'feature_cls'), [
    ('resnet18', 'list'), ('resnet18', 'dict'), ('resnet18', 'hook'), ('resnet18', 'getter'), ('vgg11_bn', 'hook'),
    ('vgg11_bn', 'list'), ('mobilenetv3_small_050', None), ('mobilenetv3_small_050', 'hook')])
def test_weights_of_the_network_and_of_its_extractor(base, feature_cls, tmp_path):
    """Both make the extractor what it was, also where the gates are trained."""
    kwargs = dict(base=base, features_only=True, feature_cls=feature_cls)
    if base == 'vgg11_bn':
        kwargs['mlp_ratio'] = 1 / 64
    model = trained(base)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / 'whole.safetensors')
    load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'whole.safetensors')))
    features = timm.create_model('gated', **kwargs, **load)
    maps = outputs(features)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    expected = model.forward_intermediates(IMAGES, intermediates_only=True)
    if base == 'resnet18':
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    torch.save(features.state_dict(), tmp_path / 'part.pth')
    load['pretrained_cfg_overlay'] = dict(file=str(tmp_path / 'part.pth'))
    again = outputs(timm.create_model('gated', **kwargs, **load))
    again = list(again.values()) if isinstance(again, dict) else again
    assert all(torch.equal(a, b) for a, b in zip(again, maps, strict=True))
    with pytest.raises(RuntimeError, match='part.pth does not fit gated; tensors .* missing'):
        timm.create_model('gated', **{k: v for k, v in kwargs.items() if 'feature' not in k}, **load)


@pytest.mark.parametrize('kind', ['list', 'getter'])
def test_weights_of_the_plain_extractor(kind, tmp_path):
    plain = random_net('resnet18', features_only=True, feature_cls=kind)
    torch.save(plain.state_dict(), tmp_path / 'part.pth')
    model = timm.create_model(
        'gated', base='resnet18', features_only=True, feature_cls=kind, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'part.pth')))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(plain), strict=True))


def test_the_network_of_fbnet_is_that_of_its_weights(tmp_path):
    """timm's has another epsilon with pretrained=True: every way to make the model has to give the same function."""
    torch.save(random_net('fbnetc_100').state_dict(), tmp_path / 'plain.pth')
    overlay = dict(file=str(tmp_path / 'plain.pth'))
    plain = timm.create_model('fbnetc_100', pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model('gated', base='fbnetc_100', pretrained=True, pretrained_cfg_overlay=overlay)
    assert relative(outputs(model), outputs(plain)) < 1e-6
    for source in (model, timm_spa.add_attention(plain)):
        with torch.no_grad():
            for key in gate_weights(source):
                if source.state_dict()[key].is_floating_point():
                    source.state_dict()[key].uniform_(0.1, 0.5)
        torch.save(source.state_dict(), tmp_path / 'own.pth')
        overlay = dict(file=str(tmp_path / 'own.pth'))
        again = timm.create_model('gated', base='fbnetc_100', pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(outputs(again), outputs(source))
        untrained = timm.create_model('gated', base='fbnetc_100')
        untrained.load_state_dict(source.state_dict())
        assert torch.equal(outputs(untrained), outputs(source))
    other = timm.create_model('gated', base='fbnetc_100', bn_eps=1e-5)
    assert {m.eps for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}


def timm_files():
    for path in sorted((Path(timm.__file__).parent / 'models').glob('[a-z]*.py')):
        yield path.stem, ast.parse(path.read_text(encoding='utf-8'))


def test_what_timm_does_for_pretrained_weights_only():
    """Whatever depends on `pretrained` elsewhere than in a call's arguments makes one file two functions."""
    depends = set()
    for name, tree in timm_files():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            tests = [node.test for node in ast.walk(function) if isinstance(node, (ast.If, ast.IfExp))]
            if any(getattr(node, 'id', '') == 'pretrained' for test in tests for node in ast.walk(test)):
                depends.add(f'{name}.{function.name}')
    # iformer's reads a file that has to be trusted
    assert depends == {'efficientnet.fbnetc_100', 'iformer._create_iformer'}


def test_how_timm_renames_published_weights():
    """`gated` finds the function by its name in the file of the network."""
    filters, not_strict = {}, set()
    for name, tree in timm_files():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            for keyword in call.keywords:
                if keyword.arg == 'pretrained_filter_fn' and f'timm.models.{name}' in BLOCK_TYPES:
                    filters[name] = ast.unparse(keyword.value)
                if keyword.arg == 'pretrained_strict' and ast.unparse(keyword.value) == 'False':
                    not_strict.add(name)
    assert {'convnext', 'densenet', 'regnet', 'vgg'} <= filters.keys()
    assert set(filters.values()) <= set(FILTERS)
    assert not_strict == {'dla', 'mobilenetv5'}


@pytest.mark.parametrize(('base', 'rename'), [
    ('convnext_atto', lambda key: key.replace('stem.', 'downsample_layers.0.').replace(
        'head.fc', 'head').replace('head.norm', 'norm').replace('.blocks', '').replace('conv_dw', 'dwconv').replace(
        'mlp.fc', 'pwconv').replace('stages.1.downsample', 'downsample_layers.1').replace(
        'stages.2.downsample', 'downsample_layers.2').replace('stages.3.downsample', 'downsample_layers.3')),
    ('dla34', lambda key: key), ('densenet121', lambda key: key.replace('norm1', 'norm.1').replace('conv2', 'conv.2')),
])
def test_published_weights_of_other_names(base, rename, tmp_path):
    """As timm brings them to its own names; and with tensors that timm's model does not use."""
    plain = random_net(base)
    weights = {rename(key): value for key, value in plain.state_dict().items()}
    if base == 'dla34':
        weights['level3.project.0.weight'] = weights['level3.tree1.project.0.weight'] = torch.ones(3, 3)
        weights['level3.project.1.bias'] = torch.ones(3)
        weights['level3.tree1.project.0.weight'] = plain.state_dict()['level3.tree1.project.0.weight']
    torch.save(weights, tmp_path / 'published.pth')
    load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'published.pth')))
    model = timm.create_model('gated', base=base, **load)
    assert relative(outputs(model), outputs(plain)) < 1e-6
    timm.create_model('gated', base=base, num_classes=10, **load)
    torch.save({**weights, 'level9.project.weight': torch.ones(3)}, tmp_path / 'published.pth')
    with pytest.raises(RuntimeError, match='published.pth does not fit gated; tensors .*level9.project.weight'):
        timm.create_model('gated', base=base, num_classes=10, **load)
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'published.pth')
    with pytest.raises(RuntimeError, match='published.pth does not fit gated; tensors .*layer1'):
        timm.create_model('gated', base=base, num_classes=10, **load)


def test_weights_of_masked_autoencoders(tmp_path):
    """They have no head, also not the norm layer in front of the classifier. All others have."""
    weights = random_net('convnext_atto').state_dict()
    del weights['head.norm.bias']
    torch.save(weights, tmp_path / 'other.pth')
    for kwargs in ({}, dict(num_classes=10), dict(features_only=True)):
        with pytest.raises(RuntimeError, match='1 missing: head.norm.bias'):
            timm.create_model(
                'gated', base='convnext_atto', pretrained=True,
                pretrained_cfg_overlay=dict(file=str(tmp_path / 'other.pth')), **kwargs)
    weights = {k: v for k, v in random_net('convnextv2_atto').state_dict().items() if not k.startswith('head.')}
    torch.save(weights, tmp_path / 'mae.pth')
    load = dict(base='convnextv2_atto.fcmae', pretrained=True)
    for kwargs in ({}, dict(num_classes=10), dict(features_only=True)):
        for key in ('stem.1.weight', None):
            torch.save({k: v for k, v in weights.items() if k != key}, tmp_path / 'mae.pth')
            load['pretrained_cfg_overlay'] = dict(file=str(tmp_path / 'mae.pth'))
            if key:
                with pytest.raises(RuntimeError, match=f'1 missing: {key}'):
                    timm.create_model('gated', **load, **kwargs)
            else:
                timm.create_model('gated', **load, **kwargs)
