"""Verification: a valid repository passes, and each kind of damage is named in one line."""
import copy
import hashlib
import json
import os
import pickle
import socket
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_server import OWNER, File, Repository
from huggingface_hub import constants
from PIL import Image

import timm_spa  # noqa: F401
import timm_spa_cli
from timm_spa.hub.publish import publish
from timm_spa.hub.verify import Report, _check_use, verify

NAME = 'spa_mobilenetv2_cifar'
METADATA = dict(format='pt', model=f'{NAME}.test')


@pytest.fixture(scope='module')
def trained():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=3).eval().state_dict()


@pytest.fixture
def folder(tmp_path, trained):
    path = tmp_path / 'repository'
    path.mkdir()
    cfg = timm.get_pretrained_cfg(NAME)
    config = dict(
        architecture=NAME, num_classes=3, num_features=1280, label_names=['bird', 'cat', 'ant'], pretrained_cfg=dict(
            tag='test', input_size=[3, 32, 32], mean=list(cfg.mean), std=list(cfg.std), crop_pct=1.0, num_classes=3,
            interpolation='bilinear', classifier='classifier', first_conv='conv_stem',
            hf_hub_filename='model.safetensors'))
    (path / 'config.json').write_text(json.dumps(config))
    (path / 'README.md').write_text(
        '---\nlicense: apache-2.0\nlibrary_name: timm\npipeline_tag: image-classification\n---\n# text\n')
    safetensors.torch.save_file(trained, path / 'model.safetensors', metadata=METADATA)
    return path


def change_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    config.update(changes)
    (folder / 'config.json').write_text(json.dumps(config))


def change_cfg(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    change_config(folder, pretrained_cfg={**config['pretrained_cfg'], **changes})


def change_weights(folder, metadata=METADATA, **changes):
    tensors = copy.deepcopy(safetensors.torch.load_file(folder / 'model.safetensors'))
    for name, value in changes.items():
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    safetensors.torch.save_file(tensors, folder / 'model.safetensors', metadata=metadata)


def test_a_valid_folder(folder, capsys):
    report = verify(folder)
    assert report.problems == []
    checked = '\n'.join(report.checked)
    for check in (
            'README.md', 'config.json', 'metadata', 'for pickles', 'finite values', 'one forward pass of (3, 32, 32)'):
        assert check in checked
    assert timm_spa_cli.main(['verify', str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == 'No problem found.'
    assert all(line.startswith('checked: ') for line in out[:-1])


def test_a_detector_needs_its_check(folder):
    """Its files are checked anyway, and the check of the detector has its own lines."""
    change_config(folder, detector='retinanet')
    (folder / 'README.md').unlink()
    missing, problem = verify(folder).problems
    assert missing == 'README.md is missing'
    assert 'has a detector, which was not checked' in problem
    assert 'check_detector=timm_spa.detection.repository.check_detector' in problem
    report = verify(folder, check_detector=lambda path: ([f'boxes of {path}'], ['no boxes']))
    assert report.checked[-1] == f'boxes of {folder}'
    assert report.problems == [missing, 'no boxes']


def test_a_file_that_names_the_architecture_alone(folder):
    change_weights(folder, metadata=dict(METADATA, model=NAME))
    assert verify(folder).problems == []


@pytest.mark.parametrize(('logits', 'shown'), [
    (torch.zeros(2, 4), 'returned (2, 4) with 0 values'),
    (torch.tensor([[0., float('inf'), 0.]] * 2), 'returned (2, 3) with 2 values')])
def test_an_invalid_forward_pass(folder, logits, shown):
    class Model:
        num_classes = 3
        pretrained_cfg = dict(input_size=(3, 32, 32))

        def __call__(self, images):
            return logits

    report = Report()
    _check_use(folder, Model(), report)
    (problem,) = report.problems
    assert shown in problem


def test_a_file_instead_of_its_folder(folder):
    (problem,) = verify(folder / 'model.safetensors').problems
    assert 'is a file. Name its folder' in problem


def test_a_folder_whose_files_were_being_replaced(folder):
    (folder / '.timm_spa-1-a.old').mkdir()
    (problem,) = verify(folder).problems
    assert problem.startswith('.timm_spa-1-a.old exists: a command was killed')


def test_a_size_that_looks_like_a_pickle(folder):
    """A safetensors file begins with the size of its header, here the bytes of a pickle of protocol 4."""
    header = json.dumps({'x': dict(dtype='U8', shape=[1], data_offsets=[0, 1])}).encode().ljust(0x0480)
    (folder / 'other.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + b'0')
    assert safetensors.torch.load_file(folder / 'other.safetensors')['x'].tolist() == [48]
    assert verify(folder).problems == []


def nan_tensor(folder):
    value = safetensors.torch.load_file(folder / 'model.safetensors')['conv_stem.weight']
    value[0, 0, 0, 0] = float('nan')
    change_weights(folder, **{'conv_stem.weight': value})


def infinite_variance(folder):
    change_weights(folder, **{'bn1.running_var': torch.full((32,), float('inf'))})


def negative_variance(folder):
    change_weights(folder, **{'bn1.running_var': torch.full((32,), -1.0)})


def wrong_shape(folder):
    change_weights(folder, **{'classifier.bias': torch.zeros(4)})


def missing_key(folder):
    change_weights(folder, **{'blocks.0.0.attn.pyramid_weight': None})


def other_model(folder):
    other = timm.create_model('spa_b_mobilenetv2_cifar', num_classes=3)
    safetensors.torch.save_file(other.state_dict(), folder / 'model.safetensors', metadata=METADATA)


def truncated(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def newest_pickle(folder):
    (folder / 'notes').write_bytes(pickle.dumps({'a': 1}, protocol=5))


def pickle_by_name(folder):
    (folder / 'pytorch_model.bin').write_bytes(b'anything')


def pickle_by_content(folder):
    torch.save(torch.zeros(1), folder / 'notes')


def old_pickle_by_content(folder):
    torch.save(torch.zeros(1), folder / 'notes.txt', _use_new_zipfile_serialization=False)


def damaged_zip(folder):
    torch.save(torch.zeros(1), folder / 'notes')
    content = (folder / 'notes').read_bytes()
    (folder / 'notes').write_bytes(content.replace(b'PK\x01\x02', b'PK\x01\x03'))


DAMAGE = [
    (damaged_zip, 'notes cannot be read and may be a pickle: Bad magic number for central directory'),
    (nan_tensor, '1 tensors with values that are not finite: conv_stem.weight'),
    (infinite_variance, 'not finite: bn1.running_var'),
    (negative_variance, 'negative variances: bn1.running_var'),
    (wrong_shape, '1 of the wrong shape: classifier.bias (4,), expected (3,)'),
    (missing_key, '1 missing: blocks.0.0.attn.pyramid_weight'),
    (other_model, 'does not fit spa_mobilenetv2_cifar'),
    (truncated, 'truncated'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors does not exist'),
    (lambda folder: change_weights(folder, metadata=None), 'names the model None, but'),
    (lambda folder: change_weights(folder, metadata=dict(METADATA, model='se_x.y')),
     'names the model se_x.y, but config.json describes spa_mobilenetv2_cifar.test'),
    (lambda folder: change_weights(folder, metadata=dict(model=NAME)), 'model.safetensors: missing format "pt"'),
    (pickle_by_name, 'pytorch_model.bin is a pickle'),
    (pickle_by_content, 'notes is a pickle'),
    (old_pickle_by_content, 'notes.txt is a pickle'),
    (newest_pickle, 'notes is a pickle'),
    (lambda folder: change_config(folder, architecture='spa_resnet7'),
     "the name of a registered model, got 'spa_resnet7'"),
    (lambda folder: change_config(folder, num_classes=4), 'config.json has 4 classes, but 3'),
    (lambda folder: change_config(folder, num_features=7), 'num_features 7, but spa_mobilenetv2_cifar has 1280'),
    (lambda folder: change_config(folder, label_names=['a', 'b']), '2 different label_names for 3 classes'),
    (lambda folder: change_config(folder, label_names=['a', 'b', 'a']), '2 different label_names for 3 classes'),
    (lambda folder: change_config(folder, id2label={'0': 'a', '1': 'b'}),
     'the keys of id2label should be the classes 0 to 2'),
    (lambda folder: change_config(folder, model_args=dict(num_classes=3)), 'a duplicate num_classes in model_args'),
    (lambda folder: change_config(folder, model_args=dict(pyramid_sizes=[0])), 'cannot be created'),
    (lambda folder: change_cfg(folder, hf_hub_filename=None), 'does not set hf_hub_filename'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'config.json cannot be read'),
    (lambda folder: (folder / 'config.json').write_text('{}'),
     'config.json: missing architecture, num_classes, pretrained_cfg'),
    (lambda folder: (folder / 'README.md').unlink(), 'README.md is missing'),
    (lambda folder: (folder / 'README.md').write_text('# text'), 'README.md: missing readable metadata'),
    (lambda folder: (folder / 'README.md').write_text('---\nlicense: mit\n---\n'),
     'README.md: missing library_name, pipeline_tag'),
]


@pytest.mark.quick(15)
@pytest.mark.parametrize(('damage', 'line'), DAMAGE, ids=[f'{i} {line}' for i, (_, line) in enumerate(DAMAGE)])
def test_damage_is_named(folder, damage, line, capsys):
    damage(folder)
    assert timm_spa_cli.main(['verify', str(folder)]) == 1
    problems = [text for text in capsys.readouterr().out.splitlines() if text.startswith('problem: ')]
    assert any(line in problem for problem in problems), problems


SIZES = ([3, 20000, 20000], [3, 32], [3, 32, -1], [3, 32.5, 32], [3, 'a', 32], [True, 32, 32], '3x32x32', None, {}, 7)
INVALID_CONFIGS = [
    *(dict(architecture=value) for value in (7, None, ['spa_resnet18'], {}, '../x', 'resnet18.a1_in1k')),
    *(dict(num_classes=value) for value in (0, -1, 2.5, '3', None, True, 10 ** 12)),
    *(dict(num_features=value) for value in ('1280', [1280])), dict(global_pool=['avg']),
    *(dict(label_names=value) for value in ('abc', [1, 2, 3], [None] * 3, {'a': 0}, [['a'], ['b'], ['c']])),
    *(dict(id2label=value) for value in (['a'], {'0': 1}, 'x')), dict(dtype=32), dict(cfg=dict(label_descriptions='x')),
    *(dict(label_descriptions=value) for value in (['a'], {'bird': 1}, 'x')),
    *(dict(model_args=value) for value in (
        [], 'x', dict(pretrained=True), dict(checkpoint_path='/etc/hostname'), dict(pretrained_cfg=dict(file='/etc/x')),
        dict(pretrained_cfg_overlay=dict(url='http://127.0.0.1:9/x')), dict(features_only=True), dict(meow=1),
        dict(cache_dir='/tmp/x'))),
    *(dict(cfg=value) for value in ([], 'x', None, 3)),
    *(dict(cfg=dict(input_size=value)) for value in SIZES),
    *(dict(cfg={key: value}) for key in ('mean', 'std') for value in (
        None, 0.5, [0.5] * 2, ['a'] * 3, [None] * 3, [float('nan')] * 3, [float('inf')] * 3)),
    dict(cfg=dict(std=[0.0, 1.0, 1.0])), dict(cfg=dict(std=[-1.0] * 3)),
    *(dict(cfg=dict(crop_pct=value)) for value in (0, -1, 'x', None, float('nan'), 1e9, [1.0])),
    *(dict(cfg=dict(interpolation=value)) for value in ('x', None, 3, ['bilinear'])),
    *(dict(cfg=dict(crop_mode=value)) for value in ('x', 3)), *(dict(cfg=dict(tag=value)) for value in (3, ['x'])),
    *(dict(cfg=dict(url=value)) for value in ('http://127.0.0.1:9/x',)), dict(cfg=dict(file='/etc/hostname')),
    dict(cfg=dict(hf_hub_id='org/other')), dict(cfg=dict(state_dict={'a': 1})), dict(cfg=dict(custom_load=True)),
    dict(cfg=dict(source='url')), dict(cfg=dict(meow=1)), dict(cfg=dict(classifier=3)), dict(cfg=dict(first_conv=[3])),
    dict(cfg=dict(num_classes='3')), dict(cfg=dict(test_input_size=[3, 99999, 99999])),
]


@pytest.mark.parametrize('change', INVALID_CONFIGS, ids=str)
def test_a_hostile_or_invalid_config(folder, change, monkeypatch, capsys):
    """It is a problem of the report; nothing is raised, downloaded or opened."""
    def refuse(*args, **kwargs):
        raise AssertionError(f'a file asked for {args}')

    monkeypatch.setattr(socket, 'socket', refuse)
    monkeypatch.setattr(torch, 'load', refuse)
    if isinstance(change.get('cfg'), dict):
        change_cfg(folder, **change['cfg'])
    else:
        change_config(folder, **({'pretrained_cfg': change['cfg']} if 'cfg' in change else change))
    report = verify(folder)
    assert report.problems
    assert 'cannot be used' not in report.problems[0], 'found by a check, not by an unexpected error'
    assert all('asked for' not in problem and len(problem) < 700 for problem in report.problems), report.problems


@pytest.mark.parametrize('text', ['[]', '"x"', '3', 'null', '[' * 100_000, '{"a": ' * 50_000, ' ' * 3_000_000, '\xff'])
def test_a_config_that_is_not_a_mapping(folder, text):
    (folder / 'config.json').write_bytes(text.encode('latin-1'))
    (problem,) = verify(folder).problems
    assert problem.startswith('config.json')


def test_files_that_are_pipes(folder):
    for name in ('config.json', 'README.md', 'model.safetensors'):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    problems = '\n'.join(verify(folder).problems)
    assert 'config.json' in problems
    assert 'README.md' in problems


def test_a_name_that_would_break_the_report(folder, capsys):
    (folder / 'a\nNo problem found.\x1b[2J.pkl').write_bytes(b'')
    assert timm_spa_cli.main(['verify', str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == (
        r'problem: a\nNo problem found.\x1b[2J.pkl is a pickle, which can run code when it is opened. Remove it')
    assert out[-1] == '1 problem.'


def test_other_checks_run_after_an_unreadable_file(folder):
    damaged_zip(folder)
    (folder / 'README.md').unlink()
    assert len(verify(folder).problems) == 2


def test_several_problems_are_several_lines(folder):
    nan_tensor(folder)
    pickle_by_name(folder)
    (folder / 'README.md').unlink()
    assert len(verify(folder).problems) == 3


def on_the_hub(hub, folder, **more):
    """Stores a folder as a repository of the Hub, with the weights as a large file."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | more
    hub.large_files.update({sha256(content): content for content in files.values()})
    repository = hub.repositories['org/name'] = Repository(private=False)
    return repository.commit('main', {
        name: File(sha256(content), content, large=True) if name == 'model.safetensors' else File(
            hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest(), content, large=False)
        for name, content in files.items()})


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_repository_of_the_hub(hub, folder):
    commit = on_the_hub(hub, folder)
    for revision in (None, 'main', commit):
        report = verify('org/name', revision)
        assert report.problems == []
        assert any('3 files against the digests of the Hub' in line and commit in line for line in report.checked)


def test_a_published_repository_is_valid(hub, tmp_path, trained, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', OWNER)
    torch.save(trained, tmp_path / 'weights.pth')
    (tmp_path / 'card.yaml').write_text('license: mit')
    publish(tmp_path / 'weights.pth', f'{NAME}.test', 'org/name', num_classes=3)
    report = verify('org/name')
    assert report.problems == []
    assert 'classifying an image' in report.checked[-1]


@pytest.mark.parametrize('name', ['model.safetensors', 'README.md'])
def test_a_flipped_byte_in_the_cache(hub, folder, name):
    """Large and small files have different kinds of digests. The damaged weights would load with a wrong value."""
    on_the_hub(hub, folder)
    verify('org/name')
    (cached,) = Path(constants.HF_HUB_CACHE).rglob(f'snapshots/*/{name}')
    content = bytearray(cached.resolve().read_bytes())
    content[-2] ^= 1
    cached.resolve().write_bytes(content)
    (problem,) = verify('hf-hub:org/name').problems
    assert problem.startswith(f'{name} is damaged: its digest is')
    assert str(cached.resolve()) in problem


def test_a_flipped_byte_during_the_download(hub, folder):
    on_the_hub(hub, folder)
    hub.fail('GET', '/objects/', flip=True)
    start = 'model.safetensors is damaged: its digest is'
    assert any(problem.startswith(start) for problem in verify('org/name').problems)


@pytest.mark.parametrize('other', [{}, {'*': b'a file whose name is a pattern'}])
def test_a_pickle_on_the_hub_is_not_downloaded(hub, folder, other):
    on_the_hub(hub, folder, **{'pytorch_model.bin': b'anything'}, **other)
    (problem,) = verify('org/name').problems
    assert problem.startswith('pytorch_model.bin has the name of a pickle')
    assert not list(Path(constants.HF_HUB_CACHE).rglob('pytorch_model.bin'))
    assert not any('pytorch_model.bin' in request for request in hub.requests)


@pytest.mark.parametrize(('source', 'revision', 'cause'), [
    ('org/missing', None, 'RepositoryNotFoundError'), ('org/name', 'v9', 'RevisionNotFoundError'),
    ('no folder', None, 'neither a folder nor the name of a repository')])
def test_a_missing_repository(hub, folder, source, revision, cause, capsys):
    on_the_hub(hub, folder)
    assert timm_spa_cli.main(['verify', source, *(['--revision', revision] if revision else [])]) == 1
    problem = [line for line in capsys.readouterr().out.splitlines() if line.startswith('problem')]
    assert len(problem) == 1
    assert source in problem[0]
    assert cause in problem[0]


@pytest.mark.parametrize('fault', [dict(status=503), dict(drop=True)])
def test_a_hub_that_does_not_answer(hub, folder, fault):
    on_the_hub(hub, folder)
    hub.fail('GET', '/api/models', **fault)
    (problem,) = verify('org/name').problems
    assert f'org/name cannot be downloaded from {hub.url}' in problem


def test_offline_mode(hub, folder, monkeypatch):
    on_the_hub(hub, folder)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    (problem,) = verify('org/name').problems
    assert 'OfflineModeIsEnabled' in problem


def test_accuracy(folder, tmp_path, trained):
    """On images whose correct classes are computed here; the labels are not in alphabetical order."""
    model = timm.create_model(NAME, num_classes=3).eval()
    model.load_state_dict(trained)
    cfg = timm.get_pretrained_cfg(NAME)
    mean, std = (torch.tensor(value)[:, None, None] for value in (cfg.mean, cfg.std))
    labels, correct, in_order = ['bird', 'cat', 'ant'], 0, 0
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        pixels = torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)
        with torch.no_grad():
            prediction = model(((pixels / 255 - mean) / std)[None]).argmax().item()
        label = labels[(prediction + (i % 3 == 0)) % 3]  # every third image is put in a wrong folder
        correct += i % 3 != 0
        in_order += prediction == i % 3
        for path in (f'images/validation/{label}/{i}.png', f'unnamed/{"xyz"[i % 3]}/{i}.png'):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / path)
    report = verify(folder, images=tmp_path / 'images', batch_size=5)
    assert report.problems == []
    assert report.accuracy == {1: pytest.approx(100 * correct / 12, abs=1e-3), 3: 100.0}
    assert '12 images' in report.checked[-1]
    change_config(folder, label_names=None)
    report = verify(folder, images=tmp_path / 'unnamed')
    assert report.accuracy[1] == pytest.approx(100 * in_order / 12, abs=1e-3), 'the labels of other weights were taken'

    change_config(folder, label_names=labels)
    dog = tmp_path / 'images' / 'validation' / 'dog'
    dog.mkdir()
    assert verify(folder, images=tmp_path / 'images').problems == [], 'a folder without images is not a class'
    Image.new('RGB', (32, 32)).save(dog / 'dog.png')
    (problem,) = verify(folder, images=tmp_path / 'images').problems
    assert 'other classes than the 3 of the model: ' in problem
    assert '3 class folders, unknown are dog' in problem
    (problem,) = verify(folder, images=tmp_path / 'nowhere').problems
    assert 'nowhere cannot be read' in problem
