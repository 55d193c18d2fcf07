"""Loading of checkpoints, with and without a recorded model and class names."""
import argparse
import json
import logging
import shutil

import pytest
import timm
import torch
import yaml
from PIL import Image

import timm_spa_cli
from timm_spa.checkpoints.run_files import RunError
from timm_spa.hub.convert import convert
from timm_spa.hub.publish import write_repository
from timm_spa.predict import ModelError, class_names, load_model

MODEL = 'spa_mobilenetv2_cifar'
MODEL_KWARGS = dict(pyramid_sizes=(1, 2, 3))


def names(model):
    return [entry['name'] for entry in class_names(model)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=3, **MODEL_KWARGS).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def training_checkpoint(folder, network):
    torch.save(dict(
        state_dict=network.state_dict(), arch=MODEL, epoch=0,
        args=argparse.Namespace(model=MODEL, num_classes=3, model_kwargs=MODEL_KWARGS)), folder / 'best.pth.tar')
    return folder / 'best.pth.tar'


def bare_with_arguments(folder, network):
    torch.save(network.state_dict(), folder / 'best.pth')
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(
        model=f'{MODEL}.tag', num_classes=3, model_kwargs=dict(pyramid_sizes=[1, 2, 3]))))
    return folder / 'best.pth'


def published(folder, network):
    run = folder / 'run'
    run.mkdir()
    file = training_checkpoint(run, network)
    (run / 'card.yaml').write_text('license: mit\n')
    (run / 'classes.txt').write_text('ant\nbee\ncat\n')
    write_repository(folder / 'out', file, f'{MODEL}.mine')
    return folder / 'out' / 'model.safetensors'


def bare_with_config(folder, network):
    """Only config.json records the model."""
    file = published(folder, network)
    (folder / 'alone').mkdir()
    torch.save(network.state_dict(), folder / 'alone' / 'weights.pth')
    config = json.loads((file.parent / 'config.json').read_text())
    config['pretrained_cfg']['mean'] = [0.1, 0.2, 0.3]
    (folder / 'alone' / 'config.json').write_text(json.dumps(config))
    return folder / 'alone' / 'weights.pth'


def converted(folder, network):
    torch.save(network.state_dict(), folder / 'best.pth')
    convert(folder / 'best.pth', folder / 'out.safetensors', MODEL, **MODEL_KWARGS)
    (folder / 'best.pth').unlink()
    return folder / 'out.safetensors'


@pytest.mark.quick(3)
@pytest.mark.parametrize('write', [
    training_checkpoint, bare_with_arguments, published, bare_with_config, converted], ids=lambda write: write.__name__)
@torch.no_grad()
def test_a_checkpoint_with_a_recorded_model(write, network, tmp_path, capsys):
    file = write(tmp_path, network)
    x = torch.randn(2, 3, 32, 32)
    count = 3 if write is converted else None  # a converted file does not record it
    for model in (load_model(None, file, count, fuse=False), load_model(str(file), None, count, fuse=False)):
        torch.testing.assert_close(model(x), network(x))
        named = write in (published, bare_with_config)
        assert names(model) == (['ant', 'bee', 'cat'] if named else ['class 0', 'class 1', 'class 2'])
        assert (model.pretrained_cfg['mean'][0] == 0.1) == (write is bare_with_config)
    Image.new('RGB', (32, 32), 'red').save(tmp_path / 'red.png')
    options = [] if count is None else ['--num-classes', str(count)]
    assert timm_spa_cli.main(['predict', str(tmp_path / 'red.png'), '--checkpoint', str(file), *options]) == 0
    assert 'grocery' not in capsys.readouterr().err, 'not the shipped model'
    assert timm_spa_cli.main(['explain', 'scales', '--checkpoint', str(file), *options, '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)[str(file)][0]) == 4


@torch.no_grad()
def test_a_checkpoint_as_the_model_to_export(network, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr('timm_spa.export.export', lambda model, *args: exported.append(model) or 1 / 0)
    file = bare_with_arguments(tmp_path, network)
    assert timm_spa_cli.main(['export', str(file), str(tmp_path / 'model.onnx'), '--to', 'onnx']) == 1
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported[0](x), network(x))


def test_a_checkpoint_without_a_recorded_model(network, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / 'bare.pth')
    expected = 'choose it with --model spa_mobilenetv2_cifar'
    with pytest.raises(RunError, match=f'The model of .*bare.pth is unknown: .* {expected}'):
        load_model(None, tmp_path / 'bare.pth')
    assert timm_spa_cli.main(['predict', 'x.jpg', '--checkpoint', str(tmp_path / 'bare.pth')]) == 1
    assert '--model' in capsys.readouterr().err
    (tmp_path / 'args.yaml').write_text('model: my_own_net\n')
    with pytest.raises(RunError, match='names my_own_net, unknown to timm'):
        load_model(None, tmp_path / 'bare.pth')
    with pytest.raises(ModelError, match='No model to load'):
        load_model()
    for name in ('missing.pth', 'runs/missing.pth.tar', 'missing.safetensors'):
        with pytest.raises(ModelError, match=f'{name} cannot be loaded: the file does not exist'):
            load_model(name)
    with pytest.raises(ModelError, match='it is a folder. Name the weights file in it, or use local-dir:'):
        load_model(str(tmp_path))
    for count in (0, -1):
        with pytest.raises(ModelError, match='number of classes must be at least 1'):
            load_model(MODEL, tmp_path / 'bare.pth', count)


def test_conflicting_records_of_the_model(network, tmp_path):
    file = training_checkpoint(tmp_path, network)
    config = json.loads((published(tmp_path, network).parent / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(dict(config, architecture='resnet18')))
    match = f'is ambiguous: .*config.json in .* names resnet18, .* names {MODEL}'
    with pytest.raises(RunError, match=match):
        load_model(None, file)
    assert names(load_model(MODEL, file)) == ['class 0', 'class 1', 'class 2'], 'config.json describes other weights'
    for content in ('{', '[]', '{"architecture": "resnet18"}', json.dumps(dict(detector='retinanet'))):
        (tmp_path / 'config.json').write_text(content)
        assert names(load_model(None, file)) == ['class 0', 'class 1', 'class 2']


def test_when_1000_classes_get_the_names_of_imagenet(tmp_path, caplog):
    """Weights converted from a plain model get ImageNet's names, unless a file has other names."""
    plain = timm.create_model('tf_efficientnet_lite0')
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    out = tmp_path / 'out'
    out.mkdir()
    file = out / 'lite.safetensors'
    convert(tmp_path / 'plain.pth', file, 'spa_tf_efficientnet_lite0')
    with caplog.at_level(logging.WARNING):
        classes = class_names(load_model(None, file))
    assert (classes[282]['label'], classes[282]['name'].split(',')[0]) == ('n02123159', 'tiger cat')
    assert 'gets the class names of ImageNet-1k' in caplog.text
    (out / 'args.yaml').write_text('model: spa_tf_efficientnet_lite0\nnum_classes: 1000\n')
    assert names(load_model(None, file))[282] == 'class 282', 'a training run of the user'
    (out / 'args.yaml').unlink()
    (out / 'classes.txt').write_text(''.join(f'mine {i}\n' for i in range(1000)))
    assert names(load_model(None, file))[282] == 'mine 282'
    # the data of a converted model with the same architecture are unknown
    again = tmp_path / 'again'
    again.mkdir()
    convert(file, again / 'same.safetensors', 'spa_tf_efficientnet_lite0')
    shutil.copy(tmp_path / 'plain.pth', again)
    assert names(load_model(None, again / 'same.safetensors'))[282] == 'class 282'
    assert names(load_model('tf_efficientnet_lite0', again / 'plain.pth'))[282] == 'class 282'


def test_weights_of_models_without_imagenet_weights(tmp_path):
    """1000 classes of a model that does not have published ImageNet weights."""
    torch.save(timm.create_model('mobilenetv2_cifar', num_classes=1000).state_dict(), tmp_path / 'plain.pth')
    convert(tmp_path / 'plain.pth', tmp_path / 'out.safetensors', MODEL)
    assert names(load_model(None, tmp_path / 'out.safetensors', 1000))[282] == 'class 282'
