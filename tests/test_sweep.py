"""Sweeps and the tables of their results, with a small script as train.py."""
import json
import re
import runpy
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / 'train_scripts' / 'sweep.py'
RESULTS = ROOT / 'train_scripts' / 'results.py'
RESULT_FOLDERS = sorted(path.parent for path in (ROOT / 'train_scripts' / 'results').glob('*/table.md'))

TRAIN = '''
import argparse, os, sys, yaml
parser = argparse.ArgumentParser()
for name in ('model', 'output', 'experiment', 'resume'):
    parser.add_argument(f'--{name}')
for name in ('seed', 'epochs'):
    parser.add_argument(f'--{name}', type=int)
parser.add_argument('--lr', type=float, default=0.1)
parser.add_argument('--model-kwargs', nargs='*', default=[])
args = parser.parse_args()
args.model_kwargs = dict(word.split('=') for word in args.model_kwargs)
folder = os.path.join(args.output, args.experiment)
os.makedirs(folder, exist_ok=True)
common = dict(batch_size=4, opt='sgd', sched='step', weight_decay=0., num_classes=10)
with open(os.path.join(folder, 'args.yaml'), 'w') as f:
    yaml.safe_dump(dict(vars(args), **common), f)
first = 1 if args.resume else 0
with open(os.path.join(folder, 'summary.csv'), 'a') as f:
    print('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', file=f)
    for epoch in range(first, args.epochs):
        if epoch and not args.resume and args.model == os.environ.get('FAIL'):
            open(os.path.join(folder, 'last.pth.tar'), 'w').close()
            print('failed', file=sys.stderr)
            sys.exit(3)
        print(f'{epoch},{3 - epoch},{4 - epoch},{len(args.model) + args.seed + epoch},{90 + epoch},0.1', file=f)
'''


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd):
    (tmp_path / 'train.py').write_text(TRAIN)
    (tmp_path / 'launch.yaml').write_text((ROOT / 'train_scripts' / 'accelerate' / 'cpu.yaml').read_text())

    def call(*args, **env):
        """Runs the script in this process, which saves the imports."""
        for name, value in dict(TIMM_SCRIPTS=str(tmp_path), **env).items():
            monkeypatch.setenv(name, value)
        try:
            code = runpy.run_path(str(SWEEP))['main'](
                ['--launch', 'launch.yaml', '--runs', 'runs', '--results', 'results', *args])
        except SystemExit as e:
            code = e.code
        for name in env:
            monkeypatch.delenv(name)
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    monkeypatch.chdir(tmp_path)
    return call


@pytest.mark.slow
def test_runs_are_stored_resumed_and_not_repeated(sweep, tmp_path):
    gated = 'gated base=resnet18 gate=se'
    arguments = [
        '--models', gated, 'spa_mobilenetv2_cifar', '--parallel', '2', '--', '--epochs', '2']
    done = sweep(*arguments, FAIL='spa_mobilenetv2_cifar')
    assert done.returncode == 1
    assert 'spa_mobilenetv2_cifar-seed42: exit code 1, see runs/spa_mobilenetv2_cifar-seed42/log.txt' in done.stderr
    assert 'failed' in (tmp_path / 'runs' / 'spa_mobilenetv2_cifar-seed42' / 'log.txt').read_text()
    name = 'gated-base=resnet18-gate=se-seed42'
    assert [p.name for p in (tmp_path / 'results').iterdir()] == [name]
    assert yaml.safe_load((tmp_path / 'results' / name / 'args.yaml').read_text())['model_kwargs'] == dict(
        base='resnet18', gate='se')

    done = sweep(*arguments)
    assert done.returncode == 0, done.stderr
    assert f'{name}: already done' in done.stdout
    assert 'spa_mobilenetv2_cifar-seed42: resuming' in done.stdout
    results = tmp_path / 'results' / 'spa_mobilenetv2_cifar-seed42'
    assert sorted(p.name for p in results.iterdir()) == ['args.yaml', 'run.json', 'summary.csv']
    record = json.loads((results / 'run.json').read_text())
    assert record['resumed'] is True
    assert record['command'].startswith('accelerate launch --config_file launch.yaml -m timm_spa.run train --epochs 2')
    assert record['versions']['timm_spa']
    assert yaml.safe_load((results / 'args.yaml').read_text())['seed'] == 42
    assert runpy.run_path(str(RESULTS))['main']([str(tmp_path / 'results')]) == 0


def write_run(folder, model, seed, top1, **changes):
    """Writes the results of a run of two epochs as sweep.py does."""
    run = folder / f'{model}-seed{seed}'
    run.mkdir(parents=True)
    args = dict(
        model=model, seed=seed, epochs=2, batch_size=4, lr=0.1, opt='sgd', sched='step', weight_decay=0.,
        num_classes=10)
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(args, **changes)))
    (run / 'summary.csv').write_text(
        f'epoch,train_loss,eval_loss,eval_top1,eval_top5\n0,3,4,{top1 + 1},90\n1,2,3,{top1},91\n')
    (run / 'run.json').write_text(json.dumps(
        dict(model=model, seed=seed, hardware='a machine', versions={'torch': '1'})))
    return run


def test_table_of_means_and_spreads(tmp_path):
    tops = {'mobilenetv2_cifar': [20, 21.5, 26], 'spa_mobilenetv2_cifar': [30, 32.25, 31]}
    for model, values in tops.items():
        for seed, top1 in enumerate(values):
            run = write_run(tmp_path, model, seed, top1)
    write_run(tmp_path, 'resnet18', 0, 22.5)
    write_run(tmp_path, 'gated', 0, 28.5, model_kwargs=dict(base='resnet18', neutral=False))
    main = runpy.run_path(str(RESULTS))['main']
    assert main([str(tmp_path)]) == 0
    table = (tmp_path / 'table.md').read_text()
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert not (tmp_path / 'pyramid_weights.png').exists()
    for label, parameters, values in (
            ('none', '2.297', tops['mobilenetv2_cifar']), ('SPA-A', '2.326', tops['spa_mobilenetv2_cifar'])):
        row = re.search(rf'^\| {label} \| .*$', table, re.M)[0]
        assert f'| {parameters} | 3 | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |' in row
    assert f'| {statistics.mean(tops["spa_mobilenetv2_cifar"]) - 22.5:+.2f} |' in table
    assert re.search(r'### resnet18\n(.*\n)+\| SPA-A, gates as initialized \| [\d.]+ \| 1 \| 28.50 \| \+6.00 \|', table)
    assert '8 runs, seeds 0, 1, 2; a machine; torch 1.' in table
    assert main([str(tmp_path), '--check']) == 0
    (run / 'summary.csv').write_text((run / 'summary.csv').read_text().replace('31', '33'))
    assert main([str(tmp_path), '--check']) == 1, 'the table differs from its runs'


@pytest.mark.parametrize('with_plain', [True, False])
def test_learning_rates_in_the_table(tmp_path, with_plain):
    """A row names the rate that is not the plain model's, however common it is, or all rows do where none is usual."""
    if with_plain:
        write_run(tmp_path, 'mobilenetv2_cifar', 0, 20, lr=0.5)
        write_run(tmp_path, 'spa_b_mobilenetv2_cifar', 0, 20)
    write_run(tmp_path, 'spa_mobilenetv2_cifar', 0, 30)
    write_run(tmp_path, 'se_mobilenetv2_cifar', 0, 28, lr=0.5)
    assert runpy.run_path(str(RESULTS))['main']([str(tmp_path)]) == 0
    table = (tmp_path / 'table.md').read_text()
    labels = re.findall(r'^\| (none|S[^|]*) \|', table, re.M)
    assert labels == (
        ['none', 'SE', 'SPA-A, lr 0.1', 'SPA-B, lr 0.1'] if with_plain else ['SE, lr 0.5', 'SPA-A, lr 0.1'])
    assert table.count('+') == (3 if with_plain else 0)


def test_comparison_on_the_same_test_images(tmp_path):
    """Of ten images the plain model has 5 correct, SPA 8: 1 lost and 4 gained, p = 2 * (1 + 5) / 2 ** 5."""
    for model, correct in (('mobilenetv2_cifar', '1111100000'), ('spa_mobilenetv2_cifar', '0111111110')):
        run = write_run(tmp_path, model, 7, 30)
        (run / 'test.csv').write_text('target,predicted\n' + ''.join(f'3,{3 if c == "1" else 4}\n' for c in correct))
    (run / 'pyramid_weights.csv').write_text('gate,4x4,1x1\na,1.1,0.9\nb,1.0,1.2\n')
    write_run(tmp_path, 'se_mobilenetv2_cifar', 7, 30)
    main = runpy.run_path(str(RESULTS))['main']
    assert main([str(tmp_path)]) == 0
    table = (tmp_path / 'table.md').read_text()
    rows = {line.split(' | ')[0]: line for line in table.splitlines() if line.startswith('| ')}
    assert rows['| none'].endswith('| 50.00 |  | 1 |')
    assert '| SPA-A | 7 | 1 | 4 | 0.38 |' in table
    assert '| 80.00 | +30.00 | 1 |' in table
    assert '|  |  | 0 |' in table, 'SE has no test.csv'
    assert '10 test images: the standard error of an accuracy is 15.81 points.' in table
    assert (tmp_path / 'pyramid_weights.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(('change', 'message'), [
    (lambda run: (run / 'args.yaml').unlink(), 'holds no results'),
    (lambda run: run.rename(run.with_name('se_mobilenetv2_cifar-seed1')),
     'args.yaml has mobilenetv2_cifar with seed 1'),
    (lambda run: (run / 'summary.csv').write_text('epoch,eval_top1\n0,1\n'), 'is incomplete: it has 1 of 2 epochs'),
    (lambda run: (run / 'summary.csv').unlink(), 'is incomplete: it has 0 of 2 epochs'),
    (lambda run: write_run(run.parent, 'mobilenetv2_cifar', 3, 20, weight_decay=0.2), 'was not trained like'),
    (lambda run: (run / 'run.json').unlink(), "run.json has None"),
])
def test_invalid_results_are_refused(tmp_path, capsys, change, message):
    change(write_run(tmp_path, 'mobilenetv2_cifar', 1, 20))
    assert runpy.run_path(str(RESULTS))['main']([str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'table.md').exists()


@pytest.mark.parametrize(('args', 'message'), [
    (['--models', 'spa_resnet51'], "Unknown model 'spa_resnet51'"),
    (['--models', 'spa_resnet50', '--', '--seed', '3'], '--seed is set for each run'),
    (['--models', 'spa_resnet50', '--parallel', '0'], '--parallel must be at least 1'),
    (['--models', 'spa_resnet50', '--launch', 'none.yaml'], '--launch none.yaml not found'),
])
def test_invalid_arguments(sweep, tmp_path, args, message):
    done = sweep(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('folder', RESULT_FOLDERS, ids=lambda p: p.name)
def test_tables_in_the_repository_match_their_runs(folder):
    assert runpy.run_path(str(RESULTS))['main']([str(folder), '--check']) == 0


def test_results_of_detectors(tmp_path, capsys):
    """Means over seeds, after the last epoch that all runs of a detector have, compared with means by hand."""
    main = runpy.run_path(str(RESULTS))['main']
    values = {'resnet18': [(10, 20), (14, 26, 30)], 'spa_resnet18': [(11, 23)]}
    for model, runs in values.items():
        for seed, aps in enumerate(runs):
            run = tmp_path / f'retinanet-{model}-seed{seed}'
            run.mkdir()
            (run / 'args.yaml').write_text(yaml.safe_dump(dict(
                detector='retinanet', model=model, processes=1, settings=dict(epochs=5, lr=0.1, seed=seed))))
            (run / 'summary.csv').write_text('epoch,train_loss,eval_map,eval_ap50,eval_ap75,lr\n' + ''.join(
                f'{epoch},1.5,{ap},{2 * ap},{ap + 1},0.1\n' for epoch, ap in enumerate(aps)))
    assert main([str(tmp_path)]) == 0
    table = (tmp_path / 'table.md').read_text()
    row = '| 0, 1 | 2 of 5 | 23.00 ± 4.24 | 46.00 ± 8.49 | 24.00 ± 4.24 | 1.50 ± 0.00 |'
    assert f'| RetinaNet | `resnet18` {row}' in table
    assert '| RetinaNet | `spa_resnet18` | 0 | 2 of 5 | 23.00 | 46.00 | 24.00 | 1.50 |' in table
    assert (tmp_path / 'curves.png').exists()
    assert main([str(tmp_path), '--check']) == 0
    (run / 'args.yaml').write_text((run / 'args.yaml').read_text().replace('lr: 0.1', 'lr: 0.2'))
    assert main([str(tmp_path), '--check']) == 1
    assert 'was not trained like the runs of retinanet' in capsys.readouterr().err


@pytest.mark.parametrize('page', [
    'README.md', 'train_scripts/results/README.md', 'train_scripts/recipes/finetune_photos.yaml'])
def test_means_in_the_pages_are_in_a_table(page):
    stated = re.findall(r'([\d.]+)(?: %)?(?:\*\*)? (?:±|\+-) ([\d.]*\d)', (ROOT / page).read_text())
    tables = ' '.join((folder / 'table.md').read_text() for folder in RESULT_FOLDERS)
    assert stated
    assert [pair for pair in stated if '{} ± {}'.format(*pair) not in tables] == []


@pytest.fixture
def compare(sweep, tmp_path, monkeypatch, capfd):
    """compare.py with the small train.py, and without the evaluation, which needs a model that was trained."""
    def call(*args):
        module = runpy.run_path(str(ROOT / 'train_scripts' / 'compare.py'))
        try:
            code = module['main'](['--launch', 'launch.yaml', '--runs', 'runs', '--results', 'results', *args])
        except SystemExit as e:
            code = e.code
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())

    monkeypatch.setenv('TIMM_SCRIPTS', str(tmp_path))
    return call


@pytest.mark.slow
def test_gates_are_compared_under_equal_training(compare, tmp_path):
    done = compare(
        '--base', 'resnet18', '--gates', 'none', 'spa', 'se', '--lr', 'se=0.02', '--', '--epochs', '2')
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / 'results').iterdir() if p.is_dir()) == [
        'gated-base=resnet18-gate=se-lr=0.02-seed42', 'gated-base=resnet18-gate=spa-seed42', 'resnet18-seed42']
    table = (tmp_path / 'results' / 'table.md').read_text()
    assert table in done.stdout
    assert re.findall(r'^\| (none|SE[^|]*|SPA-A) \|', table, re.M) == ['none', 'SE, lr 0.02', 'SPA-A']
    record = json.loads((tmp_path / 'results' / 'gated-base=resnet18-gate=se-lr=0.02-seed42' / 'run.json').read_text())
    assert record['command'].endswith('--model-kwargs base=resnet18 gate=se --lr 0.02')


@pytest.mark.parametrize(('args', 'message'), [
    (['--gates', 'spy'], "Unknown gate 'spy' in --gates. Known gates: none"),
    (['--gates', 'spa', '--lr', 'se=0.1'], '--lr se=0.1 is not of the form GATE=LR with a gate of --gates'),
    (['--gates', 'spa', '--lr', 'spa'], '--lr spa is not of the form GATE=LR'),
    (['--gates', 'spa', '--split', 'test'], '--split needs --data-dir'),
])
def test_invalid_comparisons(compare, tmp_path, args, message):
    done = compare('--base', 'resnet18', *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / 'runs').exists()
