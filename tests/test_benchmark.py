"""`timm-spa bench`: what is measured, in which order, and what is made of it, however long anything takes."""
import json
import os
import re
import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from test_one_form import make_model

import timm_spa_cli
from timm_spa import benchmark, benchmark_worker
from timm_spa.benchmark import BenchmarkError, Settings
from timm_spa.profile import count_cost

PAIR = ['mobilenetv2_cifar', 'spa_mobilenetv2_cifar']


def bench(*arguments):
    return timm_spa_cli.main(['bench', *map(str, arguments)])


@pytest.mark.parametrize(('mode', 'options'), [
    ('infer', []),
    pytest.param(
        'train', ['--compile-with', 'eager', '--amp', '--channels-last', '--threads', 1, '--base', PAIR[1]],
        marks=pytest.mark.slow),
])
def test_two_models(mode, options, tmp_path, capfd):
    """All of it, in processes: the table and the file say what the raw rounds say."""
    file = tmp_path / 'out.json'
    arguments = [
        *PAIR, '--mode', mode, *options, '--batch-size', 2, '--rounds', 2, '--warmup', 1, '--min-seconds', 0.01,
        '--out', file]
    assert bench(*arguments) == 0
    out = capfd.readouterr().out
    record = json.loads(file.read_text())
    base = 1 if '--base' in options else 0
    assert record['base'] == PAIR[base]
    assert record['command'] == 'timm-spa bench ' + ' '.join(map(str, arguments))
    assert set(record['environment']['versions']) == {'timm_spa', 'timm', 'torch'}
    assert record['settings']['dtype'] == ('bfloat16' if '--amp' in options else 'float32')
    assert [e['model'] for e in record['models']] == PAIR
    rounds = [e['rounds'] for e in record['models']]
    assert [[r['sequence'] for r in of_model] for of_model in rounds] == [[0, 2], [1, 3]], 'A B A B'
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for i, entry in enumerate(record['models']):
        speeds = [2 * r['steps'] / r['seconds'] for r in rounds[i]]
        ratios = [
            (r['steps'] / r['seconds']) / (b['steps'] / b['seconds'])
            for r, b in zip(rounds[i], rounds[base], strict=True)]
        assert entry['images_per_second']['median'] == pytest.approx(statistics.median(speeds))
        assert entry['ratio']['median'] == pytest.approx(statistics.median(ratios))
        assert all(r['seconds'] >= 0.01 for r in rounds[i])
        assert entry['parameters'] == count_cost(PAIR[i]).parameters
        assert entry['peak_memory'] > 50e6
        assert entry['construction_seconds'] > 0
        assert (entry['kept_per_image'] is None) == (mode == 'infer')
        assert (entry['graphs'], entry['graph_breaks']) == ((1, 0) if '--compile-with' in options else (0, 0))
        shown = re.findall(r'[\d.]+', lines[PAIR[i]].partition('3x32x32')[2])
        assert shown[0] == f'{statistics.median(speeds):.1f}'
        assert shown[3] == f'{statistics.median(ratios):.3f}'
        if mode == 'train':
            assert shown[6] == f'{entry["kept_per_image"] / 2 ** 20:.1f}'
        assert shown[8 if mode == 'train' else 7] == f'{entry["parameters"] / 1e6:.3f}'
    assert f'{mode}, ' in out


class Fake:
    """A worker whose measurements are written down in advance, on a machine that slows down in the course of them."""
    seconds = {
        'resnet18': [1., 4., 16., 64., 65.], 'resnet34': [2., 12., 20., 320., 130.], 'resnet50': [9., 8., 7., 6., 5.]}
    asked = []

    def __init__(self, model, settings):
        self.model = model
        self.left = list(self.seconds[model])
        self.closed = False

    def ask(self, what):
        Fake.asked.append((self.model, what))
        return dict(
            measure=lambda: dict(steps=3, seconds=self.left.pop(0)),
            prepare=lambda: dict(
                environment=dict(hardware='a machine', python='3', versions=dict(torch='2')), input=[3, 224, 224],
                parameters=1_000_000, construction_seconds=0.5, graphs=2, graph_breaks=1),
            memory=lambda: dict(peak_memory=2 ** 20, peak_memory_is='a memory', kept_per_image=3 * 2 ** 20),
        )[what]()

    def close(self):
        Fake.asked.append((self.model, 'close'))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(benchmark, 'Worker', Fake)
    monkeypatch.setattr(Fake, 'asked', [])
    return Fake


def test_ratios_are_of_one_round_and_rounds_are_taken_in_turn(fake):
    models = ['resnet34', 'resnet18', 'resnet50']
    record = benchmark.measure(models, Settings(rounds=5, batch_size=7), base='resnet18')
    measured = [model for model, what in fake.asked if what == 'measure']
    assert measured == models * 5
    steps = [what for _, what in fake.asked]
    assert steps == ['prepare'] * 3 + ['measure'] * 15 + ['memory'] * 3 + ['close'] * 3

    ratios = [a / b for a, b in zip(fake.seconds['resnet18'], fake.seconds['resnet34'], strict=True)]
    entry = record['models'][0]
    assert [r['ratio'] for r in entry['rounds']] == pytest.approx(ratios)
    # the ratio of the two medians would be 0.8, and that of the means 0.31
    assert entry['ratio']['median'] == pytest.approx(0.5)
    assert [entry['ratio']['first_quartile'], entry['ratio']['third_quartile']] == pytest.approx(
        np.percentile(ratios, [25, 75]))
    assert entry['images_per_second']['median'] == pytest.approx(7 * 3 / 20)
    assert record['models'][1]['ratio'] == dict(median=1, first_quartile=1, third_quartile=1)
    assert 'broke the graph of: resnet34 1, resnet18 1, resnet50 1 times' in '\n'.join(benchmark.notes(record))


def test_one_round_and_a_model_against_itself(fake):
    record = benchmark.measure(['resnet18', 'resnet18'], Settings(rounds=1))
    assert [e['model'] for e in record['models']] == ['resnet18', 'resnet18 #2']
    assert record['models'][1]['ratio'] == dict(median=1, first_quartile=1, third_quartile=1)


def test_reparam_has_two_bases(fake, tmp_path, capsys):
    """The base in the form that the others have, and as it is built, measured in the same rounds."""
    path = tmp_path / 'record.json'
    assert bench('resnet18', 'resnet50', '--reparam', '--rounds', 5, '--out', path) == 0
    record = json.loads(path.read_text())
    assert [e['model'] for e in record['models']] == ['resnet18', 'resnet50', 'resnet18 as built']
    assert [model for model, what in fake.asked if what == 'measure'] == ['resnet18', 'resnet50', 'resnet18'] * 5
    seconds = fake.seconds
    ratios = [a / b for a, b in zip(seconds['resnet18'], seconds['resnet50'], strict=True)]
    assert [r['ratio'] for r in record['models'][1]['rounds']] == pytest.approx(ratios)
    assert [r['ratio_as_built'] for r in record['models'][1]['rounds']] == pytest.approx(ratios)
    out = capsys.readouterr().out
    assert 'to resnet18 as built' in out
    assert 'infer reparameterized, eager' in out
    assert 'ratio_as_built' not in benchmark.measure(['resnet18'], Settings(rounds=1))['models'][0]


@pytest.mark.parametrize('name', [
    'resnet18', 'resnet50d', 'seresnet50', 'mobilenetv2_100', 'tf_efficientnet_lite0', 'mobilenetv2_cifar'])
@torch.no_grad()
def test_a_plain_net_has_its_norm_layers_merged(name):
    """As the blocks of this package have, so that the two can be compared; the function stays."""
    net = make_model(name).double()
    x = torch.randn(2, 3, 64, 64).double()
    expected = net(x)
    merged = benchmark_worker.reparameterized(net, x[:1])
    assert not [n for n, m in merged.named_modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(merged(x), expected)


def test_a_net_that_cannot_be_merged_is_not_measured(monkeypatch):
    class Twice(nn.Module):
        """Reads the convolution's output beside the norm layer."""
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            nn.init.constant_(self.bn.weight, 3)

        def forward(self, x):
            x = self.conv(x)
            return self.bn(x) + x

    with pytest.raises(RuntimeError, match='merging the norm layers changed the outputs'):
        benchmark_worker.reparameterized(Twice().eval(), torch.randn(1, 3, 8, 8))


def test_a_full_disk_leaves_what_was_there(fake, tmp_path, capsys, disk_of):
    """The figures are on the screen by then."""
    file = tmp_path / 'out.json'
    file.write_text('before')
    with disk_of(100):
        assert bench('resnet18', '--rounds', 2, '--out', file, '--overwrite') == 1
    captured = capsys.readouterr()
    assert 'File too large' in captured.err
    assert 'to resnet18' in captured.out
    assert file.read_text() == 'before'
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(('arguments', 'message'), [
    (['resnet18', 'spa_resnet5'], "Unknown model 'spa_resnet5'"),
    (['resnet18', 'resnet34', '--base', 'resnet50'], "--base 'resnet50' is not one of the models to measure"),
    (['spa_resnet18 pyramid_sizes'], "'pyramid_sizes' is not of the form key=value"),
    (['resnet18', '--device', 'cuda'], 'finds no CUDA device'),
    (['resnet18', '--min-seconds', 'inf'], '--min-seconds must be a number'),
    (['resnet18', '--amp', '--dtype', 'float32'], '--amp computes in half precision'),
    (['resnet18', '--reparam', '--mode', 'train'], '--reparam makes a form for inference'),
    (['resnet18', '--out', 'missing/folder/out.json'], '--out missing/folder/out.json cannot be written'),
    (['resnet18', '--out', '.'], '--out . cannot be written'),
])
def test_mistakes_cost_no_measurement(arguments, message, fake, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert bench(*arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count('\n') == 1
    assert not fake.asked


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'MODEL'),
    (['resnet18', '--compile', '--compile-with', 'eager'], 'not allowed with argument'),
    *((['resnet18', option, '0'], f'argument {option}: must be at least 1, got 0')
      for option in ('--rounds', '--batch-size', '--img-size', '--threads', '--warmup')),
])
def test_contradictions_of_the_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        bench(*arguments)
    assert message in capsys.readouterr().err


def test_arguments_of_a_model():
    assert benchmark_worker.parse_model('spa_resnet50 pyramid_sizes=1,2 zero_init_last=False') == (
        'spa_resnet50', dict(pyramid_sizes=(1, 2), zero_init_last=False))


def test_a_process_that_dies_is_named():
    worker = benchmark.Worker('resnet18', Settings(batch_size=5))
    worker.pool.submit(os._exit, 3)
    with pytest.raises(BenchmarkError, match=r'^resnet18: the process died, .* memory with --batch-size 5\.'):
        worker.ask('prepare')
    worker.close()


@pytest.mark.slow
def test_an_error_in_the_process_names_the_model():
    worker = benchmark.Worker('resnet18', Settings(batch_size=10 ** 13))
    with pytest.raises(BenchmarkError, match=r'^resnet18: out of memory with --batch-size 10000000000000\.$'):
        worker.ask('prepare')
    worker.close()


def test_variables_are_kept_and_shown(fake, monkeypatch):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '12345')
    monkeypatch.setenv('SOMETHING_ELSE', '1')
    record = benchmark.measure(['resnet18'], Settings(rounds=1))
    assert record['variables']['MALLOC_TRIM_THRESHOLD_'] == '12345'
    assert 'SOMETHING_ELSE' not in record['variables']
    assert any(line.startswith('With ') and 'MALLOC_TRIM_THRESHOLD_=12345' in line for line in benchmark.notes(record))


@pytest.mark.slow
def test_models_of_other_packages(monkeypatch, tmp_path, capsys):
    """--import makes them known, here and in the process that measures them."""
    module = tmp_path / 'other_models.py'
    module.write_text(
        'import timm\n'
        'from timm.models import register_model\n\n\n'
        '@register_model\n'
        'def other_resnet18(pretrained=False, **kwargs):\n'
        "    return timm.create_model('resnet18', **kwargs)\n")
    small = ('other_resnet18 num_classes=2', '--img-size', 32, '--batch-size', 1, '--rounds', 1, '--min-seconds', 0)
    assert bench(*small) == 1
    assert "Unknown model 'other_resnet18'" in capsys.readouterr().err
    assert bench(*small, '--import', 'other_models') == 1
    assert "--import other_models: ModuleNotFoundError: No module named 'other_models'" in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
    assert bench(*small, '--import', 'other_models') == 0
    assert 'other_resnet18' in capsys.readouterr().out


class Net(nn.Module):
    """Notes how it is called, and takes its time for it: more in the first call."""
    pretrained_cfg = dict(input_size=(3, 8, 6))
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.calls = []

    def forward(self, x):
        time.sleep(0.01 if self.calls else 0.5)
        self.calls.append(dict(
            shape=tuple(x.shape), channels_last=x.is_contiguous(memory_format=torch.channels_last), dtype=x.dtype,
            training=self.training, inference=torch.is_inference_mode_enabled(),
            autocast=torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')))
        return self.conv(x).mean((2, 3))


def workload(net, **settings):
    settings = Settings(**{**dict(batch_size=2, warmup=2, min_seconds=0.1), **settings})
    return benchmark_worker.Workload('resnet18', settings, lambda name: net)


def test_a_round_takes_steps_for_its_time():
    """The first, slow step is none of them."""
    net = Net()
    work = workload(net)
    assert work.warm_up() == dict(graphs=0, graph_breaks=0)
    assert len(net.calls) == 1 + 2
    measured = work.measure()
    assert measured['seconds'] >= 0.1
    assert measured['seconds'] / measured['steps'] >= 0.01
    assert len(net.calls) > 3 + measured['steps'], 'some are not counted'
    assert work.memory()['peak_memory'] > 50e6


def test_memory_of_a_gpu(monkeypatch):
    """What choosing the kernels took does not count."""
    log = []
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda: log.append('reset'))
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: 123)
    work = workload(Net())
    work._device = torch.device('cuda')
    monkeypatch.setattr(work, 'step', lambda: log.append('step'))
    work.warm_up()
    assert log == ['step'] * 3 + ['reset']
    assert work.memory() == dict(
        kept_per_image=None, peak_memory=123, peak_memory_is='torch.cuda.max_memory_allocated, since the warm-up')


@pytest.mark.parametrize('compiler', [None, 'aot_eager'])
def test_what_training_keeps(compiler, fake):
    """The inputs of convolution, ReLU and classifier, once each, of one image; no parameters."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 6, 4))
    net.pretrained_cfg, net.num_classes = Net.pretrained_cfg, 4
    torch._dynamo.reset()
    work = workload(net, mode='train', batch_size=5, compile=compiler)
    work.warm_up()
    kept = work.memory()['kept_per_image']
    image, features, scores = 3 * 8 * 6 * 4, 4 * 8 * 6 * 4, 4 * 4 + 8  # with the label
    assert image + features <= kept <= image + 2 * features + 2 * scores
    assert workload(net).memory()['kept_per_image'] is None
    record = benchmark.measure(['resnet18', 'resnet50'], Settings(rounds=5, mode='train'))
    assert [row[6] for row in benchmark.table_rows(record)] == ['kept MiB/img', '3.0', '3.0']
    assert 'kept MiB/img' not in benchmark.table_rows(benchmark.measure(['resnet34'], Settings(rounds=5)))[0]


@pytest.mark.parametrize(('settings', 'expected'), [
    (dict(), dict(shape=(2, 3, 8, 6), training=False, inference=True, autocast=False, channels_last=False)),
    (dict(dtype='bfloat16', channels_last=True, img_size=5),
     dict(shape=(2, 3, 5, 5), dtype=torch.bfloat16, channels_last=True)),
    (dict(mode='train'), dict(training=True, inference=False, dtype=torch.float32)),
    (dict(mode='train', amp=True, dtype='bfloat16'), dict(dtype=torch.float32, autocast=torch.bfloat16)),
])
def test_the_model_is_run_as_asked(settings, expected, monkeypatch):
    stepped = []
    monkeypatch.setattr(
        torch.optim.SGD, 'step', lambda self: stepped.append(self.param_groups[0]['params'][0].grad.abs().sum()))
    net = Net()
    workload(net, **settings).warm_up()
    assert net.calls[0].items() >= expected.items()
    assert len(stepped) == (3 if settings.get('mode') == 'train' else 0)
    assert all(gradient != 0 for gradient in stepped)


class Changing(Net):
    """Is another function at each step, so that every step must be compiled."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return self.conv(x).mean((2, 3)) * self.steps


@pytest.mark.parametrize(('warmup', 'message'), [
    (2, 'the model was recompiled after its warm-up'), (20, 'recompilation limit')])
def test_what_is_compiled_again_has_no_time(warmup, message, monkeypatch):
    settings = Settings(batch_size=2, warmup=warmup, min_seconds=0., compile='eager')
    monkeypatch.setattr(benchmark_worker, '_workload', benchmark_worker.Workload(
        'resnet18', settings, lambda name: Changing()))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def ask():
        for what in ('warm_up', 'measure'):
            benchmark_worker.answer(what, 'resnet18', settings)

    if not hasattr(torch._dynamo.config, 'fail_on_recompile_limit_hit'):
        pytest.skip(f'torch {torch.__version__} does not compile this net again')
    # timm.optim sets the limit to a million where another test imports it
    limit = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)
    with limit, pytest.raises(BenchmarkError, match=f'^resnet18: .*{message}'):
        ask()
    torch._dynamo.reset()


def test_an_error_of_a_model_is_one_line(monkeypatch):
    def broken(model, settings):
        raise RuntimeError('no such thing\nand more of it')

    monkeypatch.setattr(benchmark_worker, 'Workload', broken)
    with pytest.raises(BenchmarkError, match='^resnet18: RuntimeError: no such thing$'):
        benchmark_worker.answer('prepare', 'resnet18', Settings())
