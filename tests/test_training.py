"""Training with timm's train.py: model families, options, two processes, resuming, failures."""
import csv
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from marks import slow_unless
from PIL import Image

import timm_spa_cli
from timm_spa.training import runner as run

TESTS = Path(__file__).parent
ROOT = TESTS.parent
RECIPES = ROOT / 'train_scripts' / 'recipes'
CPU_CONFIG = ROOT / 'train_scripts' / 'accelerate' / 'cpu.yaml'

pytestmark = pytest.mark.usefixtures('timm_scripts')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two splits of sixteen 40x40 images in two classes of different brightness."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label, colour in (('dark', 60), ('light', 190)):
            (root / split / label).mkdir(parents=True)
            for i in range(8):
                pixels = (colour + rng.integers(-60, 60, (40, 40, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{i}.png')
    return root


@pytest.fixture
def train(data, tmp_path, timm_scripts):
    """Runs train.py in a new process: `train(*options, name=, launcher=, check=, **environment)`."""
    def call(*options, name='run', model='spa_mobilenetv2_cifar', launcher=(), check=True, preexec_fn=None, **env):
        command = [
            sys.executable, *map(str, launcher), '-m', 'timm_spa.run', 'train', '--model', model, '--num-classes', '2',
            '--data-dir', data, '--val-split', 'validation', '--device', 'cpu', '--workers', '0', '--batch-size', '8',
            '--output', tmp_path, '--experiment', name, *options]
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, preexec_fn=preexec_fn,
            env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS), os.environ.get('PYTHONPATH', '')]), **env))
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done
    call.output = tmp_path
    return call


@pytest.fixture
def train_here(data, tmp_path, timm_scripts, monkeypatch, capsys):
    """Runs train.py in this process, without new imports: `train_here(*options)` -> exit code, standard error."""
    def call(*options, name='run', model='spa_mobilenetv2_cifar'):
        monkeypatch.setattr(sys, 'argv', list(sys.argv))
        arguments = [
            '--model', model, '--num-classes', '2', '--data-dir', data, '--val-split', 'validation', '--device', 'cpu',
            '--workers', '0', '--batch-size', '8', '--output', tmp_path, '--experiment', name, *options]
        return run.main(['train', *map(str, arguments)]), capsys.readouterr().err
    call.output = tmp_path
    return call


def rows_of(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize('model', slow_unless(lambda model: model == 'spa_c_mobilenetv2_cifar', [
    'spa_resnet18', 'gated', 'spa_mobilenetv2_050', 'spa_densenet121', 'spa_b_preresnet18_cifar',
    'spa_c_mobilenetv2_cifar', 'spa_densenet_cifar', 'spa_vgg16_cifar']))
def test_each_family_trains_under_accelerate(train, model):
    """One epoch of two steps under `accelerate launch`, with the recipe of the family."""
    small = model.endswith('_cifar')
    recipe = RECIPES / ('tmm_small_image.yaml' if small else 'tmm_imagenet_mobilenetv2.yaml')
    train('--config', recipe, '--epochs', 1, '--lr', 0.01, *(() if small else ('--img-size', 64)), model=model,
          launcher=('-m', 'accelerate.commands.launch', '--config_file', CPU_CONFIG))
    assert [row['epoch'] for row in rows_of(train.output / 'run')] == [0]
    weights = torch.load(train.output / 'run' / 'last.pth.tar', weights_only=False)['state_dict']
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.quick(1)
@pytest.mark.parametrize(('model', 'options'), [
    ('spa_mobilenetv2_cifar', '--amp --amp-dtype bfloat16 --channels-last --sync-bn'),  # without effect in one process
    pytest.param('spa_c_preresnet18_cifar', '--amp --amp-dtype bfloat16 --channels-last', marks=pytest.mark.slow),
    pytest.param('spa_mobilenetv2_cifar', '--amp --amp-dtype float16', marks=pytest.mark.slow),
    pytest.param('spa_mobilenetv2_cifar', '--grad-checkpointing', marks=pytest.mark.slow),
    ('spa_c_preresnet18_cifar', '--grad-checkpointing'),
    ('spa_mobilenetv2_cifar', '--model-ema --model-ema-warmup --layer-decay 0.8 --clip-grad 1.0'),
    pytest.param('spa_b_preresnet18_cifar', '--model-ema --layer-decay 0.8', marks=pytest.mark.slow),
    pytest.param('spa_mobilenetv2_cifar', '--torchcompile', marks=pytest.mark.slow),
])
def test_options_of_the_script(train_here, model, options):
    code, errors = train_here(
        '--config', RECIPES / 'tmm_small_image.yaml', '--epochs', 2, '--lr', 0.001, *options.split(), model=model)
    assert code == 0, errors
    rows = rows_of(train_here.output / 'run')
    assert [row['epoch'] for row in rows] == [0, 1]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    checkpoint = torch.load(train_here.output / 'run' / 'last.pth.tar', weights_only=False)
    assert ('state_dict_ema' in checkpoint) == ('--model-ema' in options)


FULL_BATCH = (  # every image in every step, without augmentation: results do not depend on the order
    '--device-modules', 'training_hooks', '--no-aug', '--input-size', 3, 40, 40, '--crop-pct', 1, '--lr', 0.05, '--opt',
    'momentum', '--sched', 'cosine', '--warmup-epochs', 0, '--smoothing', 0, '--dist-bn', '')


@pytest.mark.slow
def test_two_processes_match_one(train):
    """Batches of 16, of 8 in two processes (gloo), and of 8 with accumulation have the same losses in each step."""
    options = (*FULL_BATCH, '--epochs', 4)
    train(*options, '--batch-size', 16, name='one', model='spa_resnet18')
    train(*options, '--batch-size', 8, '--grad-accum-steps', 2, name='accumulated', model='spa_resnet18')
    done = train(
        *options, '--batch-size', 8, name='two', model='spa_resnet18',
        launcher=('-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', 2, '--num_machines', 1,
                  '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', 0),
        ACCELERATE_USE_CPU='true')
    assert 'Process 0, total 2' in done.stdout + done.stderr
    assert 'Process 1, total 2' in done.stdout + done.stderr
    one = rows_of(train.output / 'one')
    assert len(one) == 4
    assert one[-1]['train_loss'] < 0.9 * one[0]['train_loss'], 'the loss decreases'

    def momentum(name):
        state = torch.load(train.output / name / 'last.pth.tar', weights_only=False)['optimizer']['state']
        return torch.cat([state[i]['momentum_buffer'].flatten() for i in sorted(state)])

    for name in ('two', 'accumulated'):
        for expected, got in zip(one, rows_of(train.output / name), strict=True):
            assert got == pytest.approx(expected, rel=1e-4), name
        assert (momentum(name) - momentum('one')).norm() < 1e-4 * momentum('one').norm(), 'gradients differ'


@pytest.mark.slow
@pytest.mark.parametrize('kill', ['KILL_AT', 'KILL_SAVING'])
def test_killed_and_resumed(train, kill):
    """A run that was killed in its third epoch, or while saving it, resumes with identical results."""
    options = (
        *FULL_BATCH, '--epochs', 5, '--batch-size', 16, '--lr', 0.005, '--clip-grad', 0.1, '--model-ema',
        '--model-ema-decay', 0.5)
    train(*options, name='whole', model='spa_mobilenetv2_cifar')
    folder = train.output / 'killed'
    assert train(*options, name='killed', model='spa_mobilenetv2_cifar', check=False, **{kill: '2'}).returncode == -9
    last = torch.load(folder / 'last.pth.tar', weights_only=False)
    assert last['epoch'] == 1
    assert [row['epoch'] for row in rows_of(folder)] == ([0, 1] if kill == 'KILL_AT' else [0, 1, 2])
    done = train(*options, '--resume', folder / 'last.pth.tar', name='killed', model='spa_mobilenetv2_cifar')
    assert 'Restoring optimizer state' in done.stdout + done.stderr
    whole, resumed = rows_of(train.output / 'whole'), rows_of(folder)
    assert [row['epoch'] for row in resumed] == [0, 1, 2, 3, 4]
    for expected, got in zip(whole, resumed, strict=True):
        assert got == pytest.approx(expected, rel=1e-4), 'momentum, learning rate or average was not restored'
    best = [torch.load(train.output / n / 'model_best.pth.tar', weights_only=False) for n in ('whole', 'killed')]
    assert best[0]['epoch'] == best[1]['epoch']
    assert not (folder / 'tmp.pth.tar').exists()


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(train):
    """A limit on the file size simulates the full disk."""
    recipe = ('--config', RECIPES / 'tmm_small_image.yaml', '--lr', 0.01)
    train(*recipe, '--epochs', 1)
    folder = train.output / 'run'
    before = digest(folder / 'last.pth.tar')
    done = train(
        *recipe, '--epochs', 2, '--resume', folder / 'last.pth.tar', check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert 'The checkpoint of epoch 1 could not be written' in message
    assert 'MiB free' in message
    assert '--resume' in message
    assert digest(folder / 'last.pth.tar') == before
    assert not (folder / 'tmp.pth.tar').exists()
    train(*recipe, '--epochs', 2, '--resume', folder / 'last.pth.tar')
    assert [row['epoch'] for row in rows_of(folder)] == [0, 1]


def test_non_finite_loss_stops_the_run(train_here):
    recipe = ('--config', RECIPES / 'tmm_small_image.yaml')
    assert train_here(*recipe, '--lr', 0.01, '--epochs', 1)[0] == 0
    folder = train_here.output / 'run'
    before = digest(folder / 'last.pth.tar')
    for batch, message in (('1', 'The loss was nan for 5 steps in a row'), ('8', 'Epoch 1 was not saved')):
        code, errors = train_here(
            *recipe, '--epochs', 3, '--resume', folder / 'last.pth.tar', '--no-resume-opt', '--lr', '1e30',
            '--batch-size', batch)
        assert code == 1
        assert message in errors.splitlines()[-1]
        assert digest(folder / 'last.pth.tar') == before


@pytest.mark.parametrize(('folder', 'cause'), [('nowhere', 'it does not exist'), ('empty', 'Found 0 images')])
def test_unreadable_data(train_here, tmp_path, folder, cause):
    (tmp_path / 'empty').mkdir()
    code, errors = train_here('--data-dir', tmp_path / folder, '--epochs', 1)
    assert code == 1
    message = errors.splitlines()[-1]
    assert str(tmp_path / folder) in message
    assert cause in message


def test_warm_start_without_network(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    code, errors = train_here('--pretrained', model='spa_resnet18')
    assert code == 1
    message = errors.splitlines()[-1]
    assert message.startswith('timm_spa.run: No weights: ')
    assert message.endswith('With train.py, use --pretrained-path FILE.')


def test_classes_of_folders_in_all_scripts(train_here, data, tmp_path, capsys, monkeypatch):
    """train.py, validate.py and inference.py use the same class numbers, also if validation lacks a class."""
    for split, labels in (('train', 'abc'), ('val', 'bc')):
        for label in labels:
            shutil.copytree(data / 'train' / ('light' if label == 'b' else 'dark'), tmp_path / 'data' / split / label)
    options = ('--data-dir', tmp_path / 'data', '--val-split', 'val', '--img-size', 32, '--epochs', 1)
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    common = ['--model', 'spa_mobilenetv2_cifar', '--device', 'cpu', '--workers', '0', '--batch-size', '8']
    train = ['train', *common, *map(str, options), '--output', str(tmp_path), '--experiment']
    assert run.main([*train, 'run']) == 0
    folder = tmp_path / 'run'
    assert yaml.safe_load((folder / 'args.yaml').read_text())['num_classes'] == 3
    assert (folder / 'classes.txt').read_text() == 'a\nb\nc\n'
    checkpoint = folder / 'last.pth.tar'
    before = digest(checkpoint)
    capsys.readouterr()
    assert run.main([*train, 'run']) == 1
    assert 'which would be overwritten' in capsys.readouterr().err
    assert digest(checkpoint) == before
    assert run.main([*train, 'run', '--resume', str(checkpoint), '--epochs', '2']) == 0
    assert [row['epoch'] for row in rows_of(folder)] == [0, 1]

    # always predict the second class, which is the first class folder of validation
    state = torch.load(checkpoint, weights_only=False)
    state['state_dict']['classifier.weight'].zero_()
    state['state_dict']['classifier.bias'].copy_(torch.tensor([0., 1., 0.]))
    torch.save(state, checkpoint)
    capsys.readouterr()
    results = tmp_path / 'results.csv'
    validate = ['validate', *common, '--checkpoint', str(checkpoint), '--data-dir', str(tmp_path / 'data')]
    assert run.main([*validate, '--split', 'val', '--results-file', str(results)]) == 0
    with open(results, newline='') as f:
        assert [row['top1'] for row in csv.DictReader(f)] == ['50.0']
    assert run.main([*validate, '--split', 'vall']) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith('Set --split to one of train, val.')
    inference = ['inference', *common, '--checkpoint', str(checkpoint), '--data-dir', str(tmp_path / 'data' / 'val')]
    assert run.main([*inference, '--results-dir', str(tmp_path / 'out')]) == 0
    assert {entry['label'] for entry in json.loads(capsys.readouterr().out.partition('--result')[2]).values()} == {'b'}


def test_no_gpu(train_here):
    code, errors = train_here('--device', 'cuda')
    assert code == (not torch.cuda.is_available())
    assert 'Try --device cpu' in errors or not code


def test_class_names_reach_predictions_and_the_card(train_here, data, capsys):
    code, err = train_here('--epochs', 1, '--img-size', 32)
    assert code == 0, err
    folder = train_here.output / 'run'
    assert (folder / 'classes.txt').read_text() == 'dark\nlight\n'
    image = str(data / 'validation' / 'dark' / '0.png')
    checkpoint = folder / 'last.pth.tar'
    model = ['--model', 'spa_mobilenetv2_cifar']
    assert timm_spa_cli.main(
        ['predict', image, *model, '--checkpoint', str(checkpoint), '--num-classes', '2', '--json']) == 0
    assert {c['name'] for c in json.loads(capsys.readouterr().out)[0]['classes']} == {'dark', 'light'}

    (folder / 'card.yaml').write_text('dataset: {name: two greys}\nlicense: mit\n')
    out = train_here.output / 'out'
    assert timm_spa_cli.main(
        ['publish', str(checkpoint), '--model', 'spa_mobilenetv2_cifar.mine', '--dry-run', str(out)]) == 0
    assert json.loads((out / 'config.json').read_text())['label_names'] == ['dark', 'light']
    assert timm_spa_cli.main(['verify', str(out)]) == 0
    capsys.readouterr()
    assert timm_spa_cli.main(['predict', image, '--model', f'local-dir:{out}', '--json']) == 0
    assert {c['name'] for c in json.loads(capsys.readouterr().out)[0]['classes']} == {'dark', 'light'}
    assert 'label_names' in (out / 'README.md').read_text()
