"""The model `gated`: attention for any CNN of timm by name and plain data, through timm's loading and the Hub."""
import json

import pytest
import timm
import torch
from marks import slow_unless
from safetensors.torch import save_file
from test_add_attention import random_net, relative

import timm_spa
import timm_spa_cli
from timm_spa.checkpoints.warm_start import gated_modules

BASES = [
    'resnet18', 'convnext_atto', 'mobilenetv3_small_050', 'densenet121', 'vgg11_bn', 'repvgg_a0', 'hrnet_w18_small']
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def written(model, path):
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def trained(base, **kwargs):
    model = timm_spa.add_attention(random_net(base), **kwargs)
    with torch.no_grad():
        for _, module in gated_modules(model):
            for p in module.attn.parameters():
                p.uniform_(-0.3, 0.3)
    return model


def arguments(base):
    return dict(dict(mlp_ratio=1 / 64) if base.startswith('vgg') else {}, base=base)


@pytest.mark.quick(4)
@pytest.mark.parametrize('base', BASES)
def test_weights_of_the_plain_net_are_a_warm_start(base, tmp_path):
    plain = random_net(base)
    loading = written(plain, tmp_path / 'plain.safetensors')
    model = timm.create_model('gated', **arguments(base), **loading)
    assert torch.equal(outputs(model), outputs(plain))
    assert model.pretrained_cfg['architecture'] == 'gated'
    assert model.pretrained_cfg['mean'] == plain.pretrained_cfg['mean']
    maps = outputs(timm.create_model('gated', **arguments(base), features_only=True, **loading))
    expected = outputs(timm.create_model(
        base, **{k: v for k, v in arguments(base).items() if k != 'base'}, features_only=True, **loading))
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    other = timm.create_model('gated', **arguments(base), **loading, neutral=False)
    assert relative(outputs(other), outputs(plain)) > 1e-3


@pytest.mark.parametrize('base', slow_unless(lambda base: base == 'resnet18', BASES))
def test_its_own_weights_are_loaded_strictly(base, tmp_path):
    model = trained(base)
    loading = written(model, tmp_path / 'own.safetensors')
    assert torch.equal(outputs(timm.create_model('gated', **arguments(base), **loading)), outputs(model))
    adapted = timm.create_model('gated', **arguments(base), **loading, num_classes=7, in_chans=1)
    assert adapted.eval()(IMAGES[:, :1]).shape == (2, 7)
    features = timm.create_model('gated', **arguments(base), features_only=True, **loading)
    own = {key.replace('.', '_'): value for key, value in model.state_dict().items()}
    assert all(torch.equal(value, own[key.replace('.', '_')]) for key, value in features.state_dict().items())
    with pytest.raises(RuntimeError, match='own.safetensors does not fit gated; tensors .* of the wrong shape'):
        timm.create_model('gated', **arguments(base), **loading, rd_ratio=1 / 8)


@pytest.mark.parametrize('feature_cls', ['dict', 'hook', 'getter'])
@pytest.mark.parametrize('base', ['vgg11_bn', 'resnet18'])
def test_every_feature_extractor(base, feature_cls, tmp_path):
    kwargs = written(random_net(base), tmp_path / 'plain.safetensors')
    kwargs.update(features_only=True, feature_cls=feature_cls)
    model = timm.create_model('gated', **arguments(base), **kwargs)
    maps = outputs(model)
    expected = outputs(timm.create_model(base, **{k: v for k, v in arguments(base).items() if k != 'base'}, **kwargs))
    assert len(list(gated_modules(model))) == 8
    if isinstance(maps, dict):
        maps, expected = list(maps.values()), list(expected.values())
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize('filename', ['model.safetensors', 'pytorch_model.bin'])
def test_a_folder_of_the_hub(filename, tmp_path):
    """config.json says all; so does timm's own `local-dir:`, for each of the files that timm knows."""
    model = trained('resnet18', gate='cbam', where=['layer4.?'])
    if filename.endswith('.bin'):
        torch.save(model.state_dict(), tmp_path / filename)
    else:
        written(model, tmp_path / filename)
    config = dict(
        architecture='gated', num_classes=1000, model_args=dict(base='resnet18', gate='cbam', where=['layer4.?']),
        pretrained_cfg=dict(model.pretrained_cfg, label_names=['a'] * 1000))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(outputs(again), outputs(model))
    assert again.pretrained_cfg['label_names'] == ['a'] * 1000
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).num_classes == 3


@pytest.mark.parametrize('gate', ['ge', 'none'])
def test_gates_without_weights(gate, tmp_path):
    """A repository's are loaded as they are; the plain net's can't be a warm start of a gate that is never neutral."""
    plain = random_net('densenet121')
    loading = written(plain, tmp_path / 'model.safetensors')
    if gate == 'ge':
        with pytest.raises(ValueError, match='The gate .* cannot be neutral.*neutral=False'):
            timm.create_model('gated', base='densenet121', gate=gate, **loading)
    else:
        model = timm.create_model('gated', base='densenet121', gate=gate, **loading)
        assert torch.equal(outputs(model), outputs(plain))
    model = timm_spa.add_attention(plain, gate, neutral=False)
    config = dict(
        architecture='gated', num_classes=1000, model_args=dict(base='densenet121', gate=gate),
        pretrained_cfg=dict(model.pretrained_cfg))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(outputs(again), outputs(model))


GATED = [('gated', 'resnet18'), ('spa_mobilenetv4_conv_small', 'mobilenetv4_conv_small')]


@pytest.mark.parametrize(('name', 'base'), GATED)
@pytest.mark.parametrize('way', ['overlay', 'configuration', 'address'])
def test_fields_of_the_configuration(name, base, way, tmp_path):
    """They hold as in timm: a head of ten classes and grey pictures, with and without weights of the same."""
    plain = random_net(base, num_classes=10, in_chans=1)
    weights = written(plain, tmp_path / 'plain.safetensors')['pretrained_cfg_overlay']
    if way == 'address':
        torch.save(plain.state_dict(), tmp_path / 'plain.pth')
        weights = dict(url=(tmp_path / 'plain.pth').as_uri(), hf_hub_id='')
    fields = dict(num_classes=10, input_size=(1, 64, 64))
    key = 'pretrained_cfg' if way == 'configuration' else 'pretrained_cfg_overlay'
    kwargs = dict(base=base, cache_dir=tmp_path)
    model = timm.create_model(name, **kwargs, **{key: fields})
    assert model.eval()(IMAGES[:, :1]).shape == (2, 10)
    model = timm.create_model(name, pretrained=True, **kwargs, **{key: dict(fields, **weights)})
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES[:, :1]), plain(IMAGES[:, :1]))
    assert model.pretrained_cfg['num_classes'] == 10
    adapted = timm.create_model(
        name, pretrained=True, num_classes=3, in_chans=3, **kwargs, **{key: dict(fields, **weights)})
    assert adapted.eval()(IMAGES).shape == (2, 3)


@pytest.mark.parametrize(('name', 'base'), [*GATED, ('gated', 'mobilenetv2_075'), ('gated', 'resnet18.a2_in1k')])
def test_own_configuration(name, base):
    """It is the one that is registered, where there is one, and of another base says the same of that."""
    cfg = timm.create_model(name, base=base, device='meta').pretrained_cfg
    plain = timm.get_pretrained_cfg(base)
    if plain.tag == 'untrained':
        assert cfg['tag'] == 'untrained'
        return
    source = f'{base.partition(".")[0]}.{plain.tag}'
    assert (cfg['tag'], cfg['hf_hub_id']) == (f'warm_{plain.tag}', f'timm/{source}')
    assert cfg['hf_hub_filename'] == 'model.safetensors'
    assert source in cfg['notes'][0]
    assert 'doi:10.1109/TMM.2021.3068576' in cfg['paper_ids']
    if name != 'gated':
        assert cfg == timm.get_pretrained_cfg(name).to_dict()


def test_registered_configurations_that_timms_scripts_pass():
    """They do so as a dict: the tag that was asked for is kept, and that of another base is not taken."""
    medium = timm.get_pretrained_cfg('spa_mobilenetv4_conv_medium.warm_e250_r384_in12k').to_dict()
    assert timm.create_model('spa_mobilenetv4_conv_medium', pretrained_cfg=medium, device='meta').num_classes == 11821
    cfg = dict(timm.get_pretrained_cfg('gated').to_dict(), num_classes=5)
    model = timm.create_model('gated', base='resnet18', pretrained_cfg=cfg, device='meta')
    assert (model.num_classes, model.pretrained_cfg['hf_hub_id']) == (5, timm.get_pretrained_cfg('resnet18').hf_hub_id)


def test_published_and_verified(tmp_path, capsys):
    (tmp_path / 'run').mkdir()
    model = trained('resnet18', pyramid_sizes=(1, 2))
    torch.save({'state_dict': model.state_dict(), 'arch': 'gated', 'epoch': 0}, tmp_path / 'run' / 'model_best.pth.tar')
    (tmp_path / 'run' / 'args.yaml').write_text(
        'model: gated\nnum_classes: 1000\nmodel_kwargs: {base: resnet18, pyramid_sizes: [1, 2]}\nimg_size: 64\n')
    (tmp_path / 'run' / 'card.yaml').write_text('dataset: {name: none}\nlicense: mit\n')
    out = tmp_path / 'out'
    command = ['publish', str(tmp_path / 'run' / 'model_best.pth.tar'), '--model', 'gated.mine', '--dry-run', str(out)]
    assert timm_spa_cli.main(command) == 0, capsys.readouterr()
    assert json.loads((out / 'config.json').read_text())['model_args']['base'] == 'resnet18'
    assert timm_spa_cli.main(['verify', str(out)]) == 0, capsys.readouterr()
    assert torch.equal(outputs(timm.create_model(f'local-dir:{out}', pretrained=True)), outputs(model))


@pytest.mark.parametrize(('name', 'kwargs', 'error', 'message'), [
    ('gated', dict(base='resnett50'), RuntimeError, "The base of gated is unknown. .* Did you mean .*resnet50"),
    ('gated', dict(base='vit_tiny_patch16_224'), ValueError, 'does not contain a block of a known type'),
    ('gated', dict(base='spa_resnet18'), ValueError, 'has gates already'),
    ('gated', dict(gate='spa_c'), ValueError, "reads the block's input"),
    ('gated.warm_a1_in1k', dict(base='resnet50.a2_in1k'), ValueError, "not of base='resnet50.a2_in1k'"),
])
def test_errors(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


def test_alone_it_is_spa_on_resnet50():
    model, named = timm.create_model('gated'), timm.create_model('spa_resnet50')
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in named.parameters())


@pytest.mark.parametrize('base', BASES)
@torch.no_grad()
def test_intermediates(base):
    """timm's own test of them goes by its files, and knows none of ours."""
    model = trained(base).eval()
    last, maps = model.forward_intermediates(IMAGES)
    assert torch.equal(last, model.forward_features(IMAGES))
    assert torch.equal(model.forward_head(last), model(IMAGES))
    plain = random_net(base).forward_intermediates(IMAGES, intermediates_only=True)
    assert [m.shape for m in maps] == [m.shape for m in plain]


def test_mobilenetv4(tmp_path):
    plain = random_net('mobilenetv4_conv_small')
    loading = written(plain, tmp_path / 'plain.safetensors')
    model = timm.create_model('spa_mobilenetv4_conv_small', **loading)
    assert torch.equal(outputs(model), outputs(plain))
    assert model.pretrained_cfg['architecture'] == 'spa_mobilenetv4_conv_small'
    tags = {tag.removeprefix('spa_').replace('.warm_', '.') for tag in timm.list_pretrained('spa_mobilenetv4*')}
    plain_tags = {*timm.list_pretrained('mobilenetv4_conv_small.*'), *timm.list_pretrained('mobilenetv4_conv_medium.*')}
    assert tags == plain_tags
    many = timm.create_model('spa_mobilenetv4_conv_medium.warm_e250_r384_in12k', device='meta')
    assert many.num_classes == 11821
