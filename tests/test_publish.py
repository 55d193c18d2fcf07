"""Publishing to a local Hub: files, refused weights and private data."""
import argparse
import json
import os
import pickle
import re
import shutil
import struct
from collections import OrderedDict
from unittest.mock import Mock

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import yaml
from hub_server import OWNER
from huggingface_hub import constants
from published import CARDS, FILES, NAME, REPO, SHIPPED, WRITTEN
from timm.utils import CheckpointSaver, ModelEmaV3

import timm_spa
import timm_spa_cli
from timm_spa.checkpoints.reading import read_weights
from timm_spa.hub.publish import PublishError, publish, write_repository


def test_the_files_of_a_repository(dry_run, weights_to_publish):
    assert sorted(p.name for p in dry_run.iterdir()) == WRITTEN
    for name in set(FILES) - {'model.safetensors'}:
        assert (dry_run / name).read_bytes() == (CARDS / name).read_bytes(), f'{name} differs from that of hub_cards'
    config = json.loads((dry_run / 'config.json').read_text())
    assert 'num_classes' not in config['model_args']
    assert config['pretrained_cfg']['hf_hub_filename'] == 'model.safetensors'
    with safetensors.safe_open(dry_run / 'model.safetensors', framework='pt') as f:
        metadata = f.metadata()
    assert metadata['format'] == 'pt'
    assert metadata['model'] == NAME
    assert metadata['timm_spa'] == timm_spa.__version__
    with safetensors.safe_open(SHIPPED, framework='pt') as f:
        assert metadata['source_sha256'] == f.metadata()['source_sha256'], 'the checkpoint that both were made from'
    shipped, published = (safetensors.torch.load_file(p) for p in (SHIPPED, dry_run / 'model.safetensors'))
    assert all(torch.equal(published[k], v) and published[k].dtype == v.dtype for k, v in shipped.items())
    assert len(shipped) == len(published)
    # from itself, byte for byte the same
    write_repository(weights_to_publish.parent, weights_to_publish, NAME)
    assert all((weights_to_publish.parent / name).read_bytes() == (dry_run / name).read_bytes() for name in FILES)


def test_a_checkpoint_of_timms_training(tmp_path, capsys):
    """Averaged weights, the model and the preprocessing of the training are published, paths of the machine are not."""
    args = argparse.Namespace(
        model='spa_mobilenetv2_cifar', num_classes=7, model_kwargs=dict(pyramid_sizes=(1, 2)), crop_pct=0.9, gp=None,
        interpolation='bicubic', input_size=(3, 40, 40), data_dir='/home/someone/my pictures/tin', output='runs/a',
        resume='../../someone/last.pth.tar', opt_kwargs={}, mean=None)
    torch.manual_seed(0)
    model = timm.create_model('spa_mobilenetv2_cifar', num_classes=7, pyramid_sizes=(1, 2))
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in ema.module.parameters():
            p += 1
    (tmp_path / 'run').mkdir()
    CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), args, model_ema=ema, checkpoint_dir=str(tmp_path / 'run'),
    ).save_checkpoint(3, 50.0)
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    (tmp_path / 'run' / 'run.json').write_text(json.dumps(dict(
        command='python -m timm_spa.run train --data-dir=/home/someone/tin --config "recipes/a.yaml"')))
    (tmp_path / 'run' / 'card.yaml').write_text('license: cc-by-4.0')

    assert timm_spa_cli.main([
        'publish', str(tmp_path / 'run' / 'model_best.pth.tar'), '--model', 'spa_mobilenetv2_cifar.mine_in1k',
        '--dry-run', str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    assert 'state_dict_ema' in out
    assert 'epoch 3' in out
    for value in ('/home/someone/my pictures/tin', '../../someone/last.pth.tar'):
        assert value in out, 'each shortened path is reported'
    published = tmp_path / 'out'
    for file in published.iterdir():
        assert b'someone' not in file.read_bytes(), f'{file.name} has a path of the machine'
    own = yaml.safe_load((published / 'args.yaml').read_text())
    assert (own['data_dir'], own['resume'], own['output']) == ('tin', 'last.pth.tar', 'runs/a')
    assert '--data-dir=tin --config' in (published / 'README.md').read_text()

    loaded = timm.create_model(f'local-dir:{published}', pretrained=True)
    assert all(torch.equal(v, ema.module.state_dict()[k]) for k, v in loaded.state_dict().items())
    cfg = loaded.pretrained_cfg
    assert (cfg['input_size'], cfg['crop_pct'], cfg['interpolation']) == ((3, 40, 40), 0.9, 'bicubic')
    assert cfg['tag'] == 'mine_in1k'
    assert cfg['license'] == 'cc-by-4.0'
    with safetensors.safe_open(published / 'model.safetensors', framework='pt') as f:
        assert f.metadata()['epoch'] == '3'


def test_an_existing_folder(weights_to_publish, dry_run, tmp_path, monkeypatch):
    """Existing files are replaced, except for the card and for files of other names."""
    weights_to_publish.with_name('notes.txt').write_text('mine')
    weights_to_publish.with_name('README.md').write_text('my card')
    changed = {k: v.flip(0) if v.ndim else v for k, v in safetensors.torch.load_file(weights_to_publish).items()}
    safetensors.torch.save_file(changed, tmp_path / 'new.safetensors')
    with pytest.raises(PublishError, match=r'has the args.yaml of another training'):
        write_repository(weights_to_publish.parent, tmp_path / 'new.safetensors', NAME)
    for name in ('args.yaml', 'summary.csv', 'run.json'):
        shutil.copy(weights_to_publish.with_name(name), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr('timm_spa.hub.publish.make_card', Mock(side_effect=ValueError('no card')))
        with pytest.raises(ValueError, match='no card'):
            write_repository(weights_to_publish.parent, tmp_path / 'new.safetensors', NAME, replace_card=True)
    assert weights_to_publish.read_bytes() == (dry_run / 'model.safetensors').read_bytes(), 'all files or none'
    notes = write_repository(weights_to_publish.parent, tmp_path / 'new.safetensors', NAME)
    assert any('README.md, unchanged' in note for note in notes)
    assert sorted(p.name for p in weights_to_publish.parent.iterdir()) == sorted([*WRITTEN, 'notes.txt'])
    written = safetensors.torch.load_file(weights_to_publish)
    assert all(torch.equal(written[k], v) for k, v in changed.items())
    assert weights_to_publish.with_name('README.md').read_text() == 'my card'
    write_repository(weights_to_publish.parent, weights_to_publish, NAME, replace_card=True)
    assert weights_to_publish.with_name('README.md').read_text().startswith('---')


def test_labels_belong_to_the_registered_weights_only(weights_to_publish, tmp_path):
    """Other weights with 200 classes do not get the labels of Tiny-ImageNet."""
    write_repository(tmp_path / 'mine', weights_to_publish, 'spa_mobilenetv2_cifar.mine')
    config = json.loads((tmp_path / 'mine' / 'config.json').read_text())
    assert config['num_classes'] == 200
    assert 'label_names' not in {**config, **config['pretrained_cfg']}
    assert 'label_names' in json.loads(weights_to_publish.with_name('config.json').read_text())['pretrained_cfg']


def test_names_of_classes(weights_to_publish, tmp_path):
    """timm reads labels and descriptions; transformers reads descriptions and the data type for training."""
    cfg = timm.get_pretrained_cfg(NAME)
    loaded = timm.create_model(f'local-dir:{weights_to_publish.parent}', pretrained=True).pretrained_cfg
    assert list(loaded['label_names']) == list(cfg.label_names)
    assert loaded['label_descriptions'] == cfg.label_descriptions
    config = json.loads(weights_to_publish.with_name('config.json').read_text())
    assert config['dtype'] == 'float32'
    assert 'label_names' not in config, 'transformers would show these instead of id2label'
    assert config['id2label'] == {str(i): cfg.label_descriptions[n] for i, n in enumerate(cfg.label_names)}

    notes = write_repository(tmp_path / 'unnamed', weights_to_publish, 'spa_mobilenetv2_cifar.mine')
    assert any('write a classes.txt next to the checkpoint' in note for note in notes)
    names = [f'thing {i}' for i in range(200)]
    weights_to_publish.with_name('classes.txt').write_text('\n'.join(names))
    notes = write_repository(tmp_path / 'named', weights_to_publish, 'spa_mobilenetv2_cifar.mine')
    assert not any('classes.txt' in note for note in notes)
    config = json.loads((tmp_path / 'named' / 'config.json').read_text())
    assert config['label_names'] == names, 'timm and transformers read these'
    assert 'id2label' not in config


def test_a_model_name_that_contradicts_the_training(hub, owner, weights_to_publish, capsys):
    args = weights_to_publish.with_name('args.yaml')
    args.write_text(args.read_text().replace('model: spa_mobilenetv2_cifar', 'model: spa_b_mobilenetv2_cifar'))
    refused(hub, weights_to_publish, 'names the model spa_b_mobilenetv2_cifar, expected spa_mobilenetv2_cifar', capsys)


class Payload:
    """Runs a command when it is unpickled, which must not happen."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def with_tensor(**changes):
    tensors = safetensors.torch.load_file(SHIPPED)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name.replace('__', '.')]
        else:
            tensors[name.replace('__', '.')] = tensor
    return tensors


NAN = torch.tensor([0.0, float('nan')] * 16)
BAD_WEIGHTS = {
    'not finite': (dict(bn1__bias=NAN), 'not finite: bn1.bias'),
    'missing': (dict(bn1__bias=None), '1 missing: bn1.bias'),
    'unexpected': (dict(extra=NAN), '1 unexpected: extra'),
    'shape': (dict(bn1__bias=NAN[:2]), r'wrong shape: bn1.bias \(2,\), expected \(32,\)'),
    'kind': (dict(bn1__bias=torch.zeros(32, dtype=torch.int8)), 'wrong kind: bn1.bias torch.int8'),
    'classes': (dict(classifier__weight=torch.zeros(10, 1280)), 'has 10 classes .* has 200'),
}
WHOLE = SHIPPED.read_bytes()
BAD_FILES = {
    'model.safetensors.index.json': (b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', 'index of weights'),
    'old.pkl': (pickle.dumps({'a': [1.5]}, protocol=0), 'is a pickle'),
    'ordered.pkl': (pickle.dumps(OrderedDict(a=1), protocol=0), 'is a pickle'),
    'newer.pkl': (pickle.dumps({'a': [1.5]}, protocol=4), 'is a pickle'),
    'empty.pth.tar': (b'', 'it is empty'),
    'empty.safetensors': (b'', 'it is empty'),
    'page.pth.tar': (b'\n<!DOCTYPE html><html>404</html>', 'a web page'),
    'page.safetensors': (b'<html>404</html>', 'a web page'),
    'pointer.safetensors': (b'version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n', 'Git LFS pointer'),
    'header.safetensors': (WHOLE[:1000], 'truncated safetensors'),
    'data.safetensors': (WHOLE[:-1000], 'truncated safetensors file, 1000 bytes are missing'),
    'disguised.pth.tar': (WHOLE[:-1000], 'truncated safetensors'),
    'noise.safetensors': (
        struct.pack('<Q', 9) + b'no header', 'it is not a safetensors file, although its name ends so'),
    'noise.pth.tar': (b'whatever it is', 'neither a safetensors file nor'),
}


def refused(hub, checkpoint, message, capsys, name=NAME):
    assert timm_spa_cli.main(['publish', str(checkpoint), '--model', name, '--repo', REPO]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count('\n') == 1, 'one line'
    assert 'weights_only' not in error, 'advice to run code from the file'
    assert not hub.requests, 'nothing was uploaded'


@pytest.mark.parametrize('kind', BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(hub, owner, tmp_path, capsys, kind):
    changes, message = BAD_WEIGHTS[kind]
    torch.save(dict(state_dict={f'module.{k}': v for k, v in with_tensor(**changes).items()}), tmp_path / 'a.pth.tar')
    refused(hub, tmp_path / 'a.pth.tar', f'a.pth.tar .*{message}', capsys)


@pytest.mark.parametrize('name', BAD_FILES)
def test_the_kind_of_an_unreadable_file_is_named(hub, owner, tmp_path, capsys, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    refused(hub, tmp_path / name, f'{name} cannot be read as weights: .*{message}', capsys)


def test_more_unreadable_files(hub, owner, tmp_path, capsys):
    torch.save(dict(state_dict=Payload(f'touch {tmp_path}/ran')), tmp_path / 'payload.pth')
    refused(hub, tmp_path / 'payload.pth', r'payload.pth .* imports posix.system', capsys)
    assert not (tmp_path / 'ran').exists()
    content = (tmp_path / 'payload.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(content[:len(content) // 2])
    refused(hub, tmp_path / 'cut.pth', 'cut.pth .* truncated file of torch.save', capsys)
    refused(hub, tmp_path, 'it is a folder', capsys)
    refused(hub, tmp_path / 'none.pth', 'none.pth does not exist', capsys)
    torch.save(dict(epoch=3), tmp_path / 'no.pth')
    refused(hub, tmp_path / 'no.pth', r'no.pth does not contain weights: .*\(epoch\)', capsys)


@pytest.mark.parametrize('name', [
    'spa_mobilenetv2_cifar', 'spa_mobilenetv2_cifar.', 'spa_mobile.mine', 'spa_mobilenetv2_cifar.a/b',
    'spa_mobilenetv2_cifar.ü'])
def test_invalid_names_of_weights(hub, owner, capsys, name):
    refused(hub, SHIPPED, f'Invalid name of weights {name!r}: expected ARCHITECTURE.TAG', capsys, name=name)


@pytest.mark.parametrize('epoch', [0, 12])
def test_the_epoch_is_in_the_metadata(tmp_path, epoch):
    torch.save(dict(state_dict=safetensors.torch.load_file(SHIPPED), epoch=epoch), tmp_path / 'best.pth')
    notes = write_repository(tmp_path / 'out', tmp_path / 'best.pth', NAME)
    assert notes[0].endswith(f'best.pth, epoch {epoch}.')
    with safetensors.safe_open(tmp_path / 'out' / 'model.safetensors', framework='pt') as f:
        assert f.metadata()['epoch'] == str(epoch)


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'run.json', 'card.yaml', 'best.safetensors'])
@pytest.mark.parametrize('kind', ['pipe', 'large', 'bomb', 'merge bomb', 'deep', 'endless'])
def test_files_that_would_take_forever(hub, owner, tmp_path, capsys, name, kind):
    if kind in ('bomb', 'merge bomb', 'endless') and not name.endswith('.yaml'):
        pytest.skip('only YAML has aliases')
    if (name, kind) == ('best.safetensors', 'large'):
        pytest.skip('weights may be large')
    shutil.copy(SHIPPED, tmp_path / 'best.safetensors')
    (tmp_path / name).unlink(missing_ok=True)
    levels = range(1, 40)
    text = {
        'large': 'a: ' + 'x' * 20_000_000,
        'bomb': 'a0: &a0 [x]\n' + ''.join(f'a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n' for i in levels),
        'merge bomb': 'a0: &a0 {x: 1}\n' + ''.join(f'a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n' for i in levels),
        'deep': '[' * 100_000, 'endless': 'a: &a [*a]'}
    if kind == 'pipe':
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(text[kind])
    refused(hub, tmp_path / 'best.safetensors', name, capsys)


@pytest.mark.parametrize('key', ['model', 'model_ema', 'state_dict', 'state_dict_ema'])
def test_keys_of_weights_in_training_checkpoints(key, tmp_path):
    state = safetensors.torch.load_file(SHIPPED)
    torch.save({'model': 'spa_mobilenetv2_cifar', 'epoch': 3, key: state}, tmp_path / 'a.pth')
    weights = read_weights(tmp_path / 'a.pth')
    assert weights.used == key
    assert weights.epoch == 3
    assert set(weights.state_dict) == set(state)


@pytest.mark.parametrize(('file', 'field', 'value'), [
    ('args.yaml', 'args.yaml: opt_kwargs: key', dict(opt_kwargs=dict(key='hf_abcdefghijklmnopqrstuvwxyz'))),
    ('args.yaml', 'args.yaml: data_dir', dict(data_dir='https://me:secret@example.org/data')),
    ('run.json', 'run.json: command', dict(command='HF_TOKEN=hf_abcdefghijklmnopqrst accelerate launch')),
    ('run.json', 'run.json: command', dict(command=f'train --wandb {OWNER}')),
    ('card.yaml', 'card.yaml: commands', dict(commands=['git clone https://x:ghp_aaaaaaaaaaaaaaaaaaaaaaaa@host/a'])),
])
def test_tokens_and_passwords_are_not_published(hub, owner, tmp_path, capsys, file, field, value):
    shutil.copy(SHIPPED, tmp_path / 'best.safetensors')
    (tmp_path / file).write_text(json.dumps(value))  # which is YAML too
    arguments = [str(tmp_path / 'best.safetensors'), '--model', NAME]
    for how in (['--repo', REPO], ['--dry-run', str(tmp_path / 'out')]):
        assert timm_spa_cli.main(['publish', *arguments, *how]) == 1
        error = capsys.readouterr().err
        assert f'{field} has what looks like a token' in error
        assert 'secret' not in error
        assert 'hf_' not in error
    assert not hub.requests
    assert not (tmp_path / 'out').exists()


def test_a_password_of_the_endpoint_is_not_printed(owner, monkeypatch, weights_to_publish):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://me:secret@127.0.0.1:9')
    with pytest.raises(PublishError, match=r'http://\*\*\*@127.0.0.1:9 does not answer') as e:
        publish(weights_to_publish, NAME, REPO)
    assert 'secret' not in str(e.value)


@pytest.mark.parametrize('repo', ["a/b');import os#", 'a/b/c', 'a', 'a b/c', 'ä/b'])
def test_names_of_repositories_are_checked_in_a_dry_run_too(repo, tmp_path, capsys):
    arguments = ['publish', str(SHIPPED), '--model', NAME, '--repo', repo, '--dry-run', str(tmp_path / 'out')]
    assert timm_spa_cli.main(arguments) == 1
    assert f'{repo!r} is not the name of a repository' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_full_disk_leaves_nothing_half_written(weights_to_publish, dry_run, tmp_path, disk_of):
    for target in (tmp_path / 'new', weights_to_publish.parent):
        with disk_of(1_000_000), pytest.raises(Exception, match='too large|os error 27|I/O'):
            write_repository(target, weights_to_publish, NAME)
    assert not (tmp_path / 'new').exists()
    assert not list(tmp_path.glob('.*'))
    assert all((weights_to_publish.parent / name).read_bytes() == (dry_run / name).read_bytes() for name in FILES)
