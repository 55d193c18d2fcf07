"""A checkpoint is made into the model that was trained, by whatever verb reads it, or refused."""
import argparse
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from marks import slow_unless
from PIL import Image

import timm_spa  # noqa: F401
import timm_spa_cli
from timm_spa.checkpoints.run_files import RunError
from timm_spa.hub import CheckpointError
from timm_spa.hub.convert import convert
from timm_spa.hub.publish import PublishError, without_private_paths, write_repository
from timm_spa.hub.verify import verify
from timm_spa.predict import ModelError, load_model, predict
from timm_spa.training.run_record import Run

NET = 'spa_mobilenetv2_cifar'
KINDS = {
    'pyramid': (NET, dict(model_kwargs=dict(pyramid_sizes=(1, 2, 3)))),
    'grey': (NET, dict(in_chans=1)),
    'grey, with its own mean': (NET, dict(in_chans=1, mean=[0.4], std=[0.3])),
    'pooling': (NET, dict(gp='max')),
    'epsilon': (NET, dict(bn_eps=0.1)),
    'preprocessing': (NET, dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], img_size=40, interpolation='bicubic')),
    'any net': ('gated', dict(model_kwargs=dict(base='resnet10t', neutral=False), img_size=32)),
}


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photograph.png')
    return tmp_path / 'photograph.png'


def train(folder, name, in_args_yaml=False, **args):
    """Writes what a training of three classes leaves, of random weights and statistics; returns the net."""
    torch.manual_seed(0)
    net = timm.create_model(
        name, num_classes=3, in_chans=args.get('in_chans'), global_pool=args.get('gp'), bn_eps=args.get('bn_eps'),
        **args.get('model_kwargs', {})).eval()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    args = dict(model=name, num_classes=3, **args)
    folder.mkdir(exist_ok=True)
    content = dict(state_dict=net.state_dict(), arch=name, epoch=0)
    if in_args_yaml:
        content = net.state_dict()
        (folder / 'args.yaml').write_text(yaml.safe_dump(json.loads(json.dumps(args))))
    torch.save(content if in_args_yaml else dict(content, args=argparse.Namespace(**args)), folder / 'best.pth')
    (folder / 'card.yaml').write_text('license: mit\n')
    (folder / 'classes.txt').write_text('ant\nbee\ncat\n')
    return net


def shares(model, picture):
    (found,) = predict(model, [picture])
    assert found.error is None, found.error
    return pytest.approx({c['name']: c['probability'] for c in found.classes}, abs=2e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize('in_args_yaml', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', slow_unless({'pyramid', 'grey'}.__contains__, KINDS))
def test_every_verb_makes_the_model_that_was_trained(kind, in_args_yaml, tmp_path, photograph, monkeypatch):
    """What a file or args.yaml beside it says of a training holds for predict, publish, convert, and once more."""
    name, args = KINDS[kind]
    run, out = tmp_path / 'run', tmp_path / 'out'
    net = train(run, name, in_args_yaml, **args)
    # the oracle: the net that was trained, on the picture as Pillow and these lines prepare it
    cfg, grey = net.pretrained_cfg, args.get('in_chans') == 1
    size = args.get('img_size') or cfg['input_size'][1]
    mean, std = (args.get(key) or ([sum(cfg[key]) / 3] if grey else cfg[key]) for key in ('mean', 'std'))
    transform = timm.data.create_transform(
        (1 if grey else 3, size, size), interpolation=args.get('interpolation', cfg['interpolation']), mean=mean,
        std=std, crop_pct=cfg['crop_pct'])
    with torch.no_grad():
        logits = net(transform(Image.open(photograph).convert('L' if grey else 'RGB'))[None])
    expected = shares(load_model(name, run / 'best.pth'), photograph)
    assert {c: p for c, p in zip(('ant', 'bee', 'cat'), logits.softmax(1)[0].tolist(), strict=True)} == expected
    write_repository(out, run / 'best.pth', f'{name}.mine')
    assert verify(out).problems == []
    assert expected == shares(load_model(f'local-dir:{out}'), photograph).expected
    # the published file alone, then converted
    kwargs = dict(args.get('model_kwargs', {}), **({'global_pool': 'max'} if 'gp' in args else {}))
    kwargs.update({'bn_eps': args['bn_eps']} if 'bn_eps' in args else {})
    alone = tmp_path / 'alone'
    alone.mkdir()
    shutil.copy(out / 'model.safetensors', alone)
    for source in (run / 'best.pth', alone / 'model.safetensors'):
        with pytest.raises(CheckpointError, match=f'contains weights of {name}.*not of {name}'):
            convert(source, tmp_path / 'c.safetensors', name, overwrite=True, **dict(kwargs, drop_rate=0.5))
        convert(source, tmp_path / 'c.safetensors', name, overwrite=True, **kwargs)
        content = (tmp_path / 'c.safetensors').read_bytes()
        convert(source, tmp_path / 'c.safetensors', overwrite=True)
        assert (tmp_path / 'c.safetensors').read_bytes() == content, 'the source says what it is'
    (tmp_path / 'classes.txt').write_text('ant\nbee\ncat\n')
    if not {'mean', 'img_size'} & args.keys():  # a file of weights does not say how to prepare a picture
        assert expected == shares(load_model(name, tmp_path / 'c.safetensors', 3), photograph).expected
    (tmp_path / 'card.yaml').write_text('license: mit\n')
    write_repository(tmp_path / 'again', tmp_path / 'c.safetensors', f'{name}.mine', num_classes=3)
    config = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert {**config.get('model_args', {}), 'in_chans': None}.items() >= json.loads(
        json.dumps(args.get('model_kwargs', {}))).items()


def test_what_contradicts_itself_is_refused(tmp_path):
    """Two nets may have the same tensors: what was trained is told by names and arguments alone."""
    run = tmp_path / 'run'
    train(run, NET, model_kwargs=dict(pyramid_sizes=(1, 2, 3)))
    attempts = [
        lambda name: load_model(name, run / 'best.pth', 3),
        lambda name: write_repository(tmp_path / 'out', run / 'best.pth', f'{name}.mine', num_classes=3)]
    for text, message in (
            (f'model: {NET}\n', r"model arguments \{'pyramid_sizes': .*args.yaml in the same folder has \{\}"),
            ('model: spa_resnet18\n', f'names the model spa_resnet18, expected {NET}')):
        (run / 'args.yaml').write_text(text)
        for attempt in attempts:
            with pytest.raises(RunError, match=message):
                attempt(NET)
    (run / 'args.yaml').unlink()
    for attempt in attempts:
        with pytest.raises(RunError, match=f'best.pth names the model {NET}, expected spa_b_{NET[4:]}'):
            attempt(f'spa_b_{NET[4:]}')
    (run / 'args.yaml').symlink_to('gone')
    with pytest.raises(RunError, match=r'args.yaml cannot be read: No such file'):
        load_model(NET, run / 'best.pth', 3)
    assert not (tmp_path / 'out').exists()


def test_the_name_of_a_class_is_no_model(tmp_path):
    """timm's saver writes it where it is not given the arguments."""
    net = train(tmp_path / 'run', NET)
    torch.save(dict(state_dict=net.state_dict(), arch='gatedefficientnet', epoch=3), tmp_path / 'run' / 'best.pth')
    assert load_model(NET, tmp_path / 'run' / 'best.pth', 3).num_classes == 3


def test_a_number_of_classes_is_of_a_checkpoint(capsys):
    """Without one, a classifier of another size would be random."""
    with pytest.raises(ModelError, match='published weights of .*grocery81 have 81 classes'):
        load_model('spa_tf_efficientnet_lite0.grocery81', num_classes=5)
    assert load_model('spa_tf_efficientnet_lite0.grocery81', num_classes=81).num_classes == 81
    for count in ('0', '-3'):
        with pytest.raises(SystemExit):
            timm_spa_cli.main(['predict', 'x.jpg', '--model', NET, '--num-classes', count])
        assert 'must be at least 1' in capsys.readouterr().err


@pytest.mark.parametrize('device', ['nonsense', 'meta', *([] if torch.cuda.is_available() else ['cuda'])])
@pytest.mark.parametrize('verb', ['predict', 'verify', 'explain'])
def test_a_device_that_is_none(verb, device, tmp_path, capsys):
    arguments = dict(predict=['x.jpg'], verify=[tmp_path], explain=['gates', 'x.jpg'])[verb]
    assert timm_spa_cli.main([verb, *map(str, arguments), '--device', device]) == 1
    err = capsys.readouterr().err
    assert f'The device {device!r} cannot be used' in err
    assert 'bug' not in err


@pytest.mark.parametrize(('mode', 'scale'), [('I;16', 257), ('I', 257)])
def test_sixteen_bits_are_eight(mode, scale, photograph, tmp_path):
    """Pillow cuts off at 255 what has more."""
    grey = Image.open(photograph).convert('L')
    grey.save(tmp_path / 'eight.png')
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16 if mode == 'I;16' else np.int32) * scale)
    wide.save(tmp_path / 'wide.tiff')
    model = load_model('spa_tf_efficientnet_lite0.grocery81')
    eight, sixteen = predict(model, [tmp_path / 'eight.png', tmp_path / 'wide.tiff'])
    assert eight.classes == sixteen.classes
    Image.fromarray(np.asarray(grey).astype(np.float32)).save(tmp_path / 'float.tiff')
    assert 'floating-point numbers' in next(predict(model, [tmp_path / 'float.tiff'])).error


def test_a_model_of_four_channels(photograph):
    model = timm.create_model(NET, in_chans=4, num_classes=3)
    with pytest.raises(OSError, match='a model of 4 channels: image files have 3'):
        next(predict(model, [photograph]))


# what publish refuses or tells

@pytest.mark.parametrize(('args', 'message'), [
    (dict(std=[0., 0., 0.]), 'std'), (dict(interpolation='foo'), 'interpolation'), (dict(crop_pct=5.), 'crop_pct')])
def test_what_verify_would_refuse_is_not_written(args, message, tmp_path):
    train(tmp_path / 'run', NET, **args)
    with pytest.raises(PublishError, match=f'do not describe a loadable model: .*{message}'):
        write_repository(tmp_path / 'out', tmp_path / 'run' / 'best.pth', f'{NET}.mine')
    assert not (tmp_path / 'out').exists()


def test_names_of_classes(tmp_path):
    run = tmp_path / 'run'
    train(run, NET)
    for text, count in (('ant\nbee\n', 2), ('ant\nbee\ncat\ndog\n', 4)):
        (run / 'classes.txt').write_text(text)
        with pytest.raises(PublishError, match=f'names {count} classes, and the model has 3'):
            write_repository(tmp_path / 'out', run / 'best.pth', f'{NET}.mine')
    (run / 'classes.txt').write_text('ant\x85\r\nbee\r\n"cat", ü\r\n\r\n')
    write_repository(tmp_path / 'out', run / 'best.pth', f'{NET}.mine')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == ['ant\x85', 'bee', '"cat", ü']
    with pytest.raises(PublishError, match=f'other classes than {NET}.tmm_tin200'):
        write_repository(tmp_path / 'other', run / 'best.pth', f'{NET}.tmm_tin200')


def test_a_thousand_classes_without_names_are_told(tmp_path):
    torch.save(timm.create_model(NET, num_classes=1000).state_dict(), tmp_path / 'best.pth')
    (tmp_path / 'card.yaml').write_text('license: mit\n')
    notes = write_repository(tmp_path / 'out', tmp_path / 'best.pth', f'{NET}.mine', num_classes=1000)
    assert any("will be taken for ImageNet's" in note for note in notes)


def test_arguments_that_yaml_does_not_know(tmp_path):
    """A checkpoint's own may have types of torch among them."""
    run = tmp_path / 'run'
    train(run, NET, amp_dtype=torch.float16, secret_scale=torch.zeros(2), betas=(0.9, 0.99))
    write_repository(tmp_path / 'out', run / 'best.pth', f'{NET}.mine')
    written = yaml.safe_load((tmp_path / 'out' / 'args.yaml').read_text())
    assert written['amp_dtype'] == 'torch.float16'
    assert written['betas'] == [0.9, 0.99]


@pytest.mark.parametrize(('command', 'published'), [
    ("train --data-dir '/home/alice/My Secret Client/data' --lr 1", "train --data-dir 'data' --lr 1"),
    ('train "/home/alice/x y" /home/alice/z', 'train "x y" z'),
    ("it is Ann's /home/alice/data of Bob's", "it is Ann's data of Bob's"),
    ("train '--data-dir=/home/alice/data' 'a' /home/alice/b 'c'", "train '--data-dir=data' 'a' b 'c'"),
    ('train --lr 0.1 --config a/b.yaml', 'train --lr 0.1 --config a/b.yaml')])
def test_private_paths_are_cut_also_in_quotes(command, published):
    run, notes = without_private_paths(Run(record=dict(command=command), args=dict(nested=[dict(a=command)])))
    assert run.record['command'] == run.args['nested'][0]['a'] == published
    assert bool(notes) == (command != published)


@pytest.mark.parametrize(('content', 'message'), [
    ({1: torch.zeros(2)}, 'not all tensors'),
    ({'a': torch.eye(3).to_sparse()}, 'sparse'),
    ({'a': torch.zeros(3).to(torch.float8_e4m3fn)}, '8-bit'),
    ({'classifier.weight': torch.tensor(1.)}, 'has no classifier'),
])
def test_tensors_that_are_no_weights(content, message, tmp_path):
    torch.save(content, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / 'w.pth', tmp_path / 'o.safetensors', NET)
    with pytest.raises(CheckpointError):
        load_model(NET, tmp_path / 'w.pth')


def test_files_have_the_mode_of_others(tmp_path):
    train(tmp_path / 'run', NET)
    before = os.umask(0o027)
    try:
        write_repository(tmp_path / 'out', tmp_path / 'run' / 'best.pth', f'{NET}.mine')
        convert(tmp_path / 'run' / 'best.pth', tmp_path / 'c.safetensors', NET)
    finally:
        os.umask(before)
    for path in (tmp_path / 'c.safetensors', *(tmp_path / 'out').iterdir()):
        assert path.stat().st_mode & 0o777 == 0o640, path


@pytest.mark.parametrize('base', ['hf-hub:evil/model', 'local-dir:/etc', 5])
def test_a_configuration_cannot_name_an_address(base, tmp_path, hub):
    train(tmp_path / 'run', 'gated', model_kwargs=dict(base='resnet10t'), img_size=32)
    write_repository(tmp_path / 'out', tmp_path / 'run' / 'best.pth', 'gated.mine')
    path = tmp_path / 'out' / 'config.json'
    config = json.loads(path.read_text())
    config['model_args']['base'] = base
    path.write_text(json.dumps(config))
    (problem,) = verify(tmp_path / 'out').problems
    assert f'must be the name of a timm model, got {base!r}' in problem
    with pytest.raises(ModelError, match='must be the name of a timm model'):
        load_model(f'local-dir:{tmp_path / "out"}')
    assert not hub.requests


@pytest.mark.parametrize('key', ['checkpoint_path', 'pretrained', 'pretrained_cfg_overlay'])
@pytest.mark.parametrize('where', ['file', 'args.yaml'])
def test_arguments_that_no_model_takes_are_refused(where, key, tmp_path):
    """A file from elsewhere cannot make timm read another one."""
    model = timm.create_model(NET, num_classes=3)
    path = tmp_path / 'best.safetensors'
    kwargs = {key: 'other.pth'}
    metadata = dict(model=NET, model_args=json.dumps(kwargs if where == 'file' else {}))
    safetensors.torch.save_file(model.state_dict(), path, metadata=metadata)
    if where == 'args.yaml':
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(model=NET, num_classes=3, model_kwargs=kwargs)))
    with pytest.raises(RunError, match=f'has the model arguments {key}, which are not arguments of a model'):
        load_model(NET, path)
