"""The command line, run like by a user."""
import importlib
import json
import keyword
import shlex
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_unless
from PIL import Image

import timm_spa
import timm_spa_cli
from timm_spa.predict import class_names, load_model, sample_image
from timm_spa.profile import LIST, describe, describe_gate, listed_gates, recorded_speeds
from timm_spa_cli._options import SHIPPED_MODEL

RECORDS = Path(__file__).parent / 'benchmarks' / 'records'
COFFEE = str(sample_image('coffee'))


def test_list_has_the_counts_of_the_authors_code(capsys):
    """Parameters and multiply-adds of convolutions and linear layers, counted by running the authors' code."""
    assert timm_spa_cli.main(['list', 'spa_resnet*']) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('spa_')}
    expected = {
        'spa_resnet18': (11.776816, 1.8183), 'spa_resnet34': (21.955376, 3.6715), 'spa_resnet50': (28.073912, 4.2124),
        'spa_resnet101': (49.296491, 8.0338), 'spa_resnet152': (66.777118, 11.8360)}
    assert set(expected) < set(lines)
    for name, (parameters, macs) in expected.items():
        assert float(lines[name][1]) == round(parameters, 3)
        assert float(lines[name][2]) == round(macs, 3)
        assert lines[name][3] == '224x224'
        assert lines[name][4] == 'warm_a1_in1k,'


def test_list_names_every_model():
    assert [*json.loads(LIST.read_text())['models']] == timm_spa.list_models()


@pytest.mark.quick(5)
@pytest.mark.parametrize('name', slow_unless(timm_spa.list_models()[::8].__contains__, timm_spa.list_models()))
def test_list_describes_a_model(name):
    """The list is built by `python -m timm_spa.profile`. Another release of timm may have other tags."""
    listed, current = json.loads(LIST.read_text())['models'][name], describe(name)
    if timm.__version__ != '1.0.31':
        current['tags'] = listed['tags']
    assert listed == current


@pytest.mark.parametrize('gate', slow_unless(['none', 'spa', 'coord', 'eca'].__contains__, listed_gates()))
def test_list_describes_a_gate(gate):
    """Built by the same tool."""
    assert json.loads(LIST.read_text())['gates'][gate] == describe_gate(gate)


def test_list_of_gates(capsys):
    """Differences to the network without gates. Those of efficient channel attention can be counted by hand."""
    assert timm_spa_cli.main(['list', '--gates']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:1 + len(listed_gates())]}
    assert list(rows) == listed_gates()
    assert rows['none'] == ['+0', '+0.0', '+0.0', '1.00', '1.00']
    kernels = {256: 5, 512: 5, 1024: 5, 2048: 7}  # (log2(channels) + 1) / 2, the next odd number
    assert int(rows['eca'][0]) == sum(count * kernels[256 * 2 ** i] for i, count in enumerate((3, 4, 6, 3)))
    spa = timm.create_model('spa_resnet50', device='meta')
    plain = timm.create_model('resnet50', device='meta')
    added = sum(p.numel() for p in spa.parameters()) - sum(p.numel() for p in plain.parameters())
    assert rows['spa'][0] == f'{added:+,}'
    assert timm_spa_cli.main(['list', '--gates', '*coord']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ['coord', 'scoord']
    assert timm_spa_cli.main(['list', '--gates', 'resnet50']) == 1
    assert "the filter 'resnet50' matches no gate of this package" in capsys.readouterr().err


def test_speeds_of_gates_are_recorded():
    """models.json has medians over the rounds of recorded runs, computed here from their steps and seconds."""
    listed = json.loads(LIST.read_text())['speeds']
    expected = {'infer': {}, 'train': {}}
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob('gates-*.json'))]
    for record in records:
        assert record['environment']['hardware'] in listed[record['settings']['mode']]['measured']
        rounds = {
            model['model']: [r['steps'] / r['seconds'] for r in model['rounds']] for model in record['models']}
        for name, speeds in rounds.items():
            ratio = statistics.median(a / b for a, b in zip(speeds, rounds['resnet50'], strict=True))
            gate = 'none' if name == 'resnet50' else name.removeprefix('gated base=resnet50 gate=')
            expected[record['settings']['mode']][gate] = pytest.approx(ratio, abs=6e-4)
    assert {mode: speed['ratios'] for mode, speed in listed.items()} == expected
    assert all(set(ratios) == set(listed_gates()) for ratios in expected.values())
    assert recorded_speeds(records) == listed
    other = dict(records[0], settings=dict(records[0]['settings'], batch_size=1))
    with pytest.raises(ValueError, match='differ in their settings'):
        recorded_speeds([records[0], other])
    with pytest.raises(ValueError, match="must be resnet50, got 'resnet18'"):
        recorded_speeds([dict(records[0], base='resnet18')])


def test_list_is_narrow_and_does_not_wait_for_torch():
    code = 'import sys, timm_spa_cli; timm_spa_cli.main(["list"]); print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    *lines, imported = done.stdout.splitlines()
    assert imported == 'False'
    assert max(map(len, lines)) <= 100
    assert len(lines) == 1 + len(timm_spa.list_models()) + 2


def test_tags(capsys):
    assert timm_spa_cli.main(['list', 'spa_resnet50', '--tags']) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert ['spa_resnet50.warm_tv2_in1k', 'Hub:', 'timm/resnet50.tv2_in1k'] in lines
    assert [line[0] for line in lines] == timm_spa.list_models('spa_resnet50.*', pretrained=True)
    assert len(lines) == len(timm.list_pretrained('resnet50.*'))


def test_list_without_a_match(capsys):
    assert timm_spa_cli.main(['list', 'resnet50']) == 1
    assert "the filter 'resnet50' matches no model of this package" in capsys.readouterr().err


def test_predict_by_the_shipped_model(capsys):
    model = timm.create_model(SHIPPED_MODEL, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(Image.open(COFFEE))[None]).argmax().item()
    arguments = ['predict', COFFEE]
    assert timm_spa_cli.main([*arguments, '--json']) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f'{SHIPPED_MODEL}: ')
    assert json.loads(captured.out)[0]['classes'][0]['label'] == model.pretrained_cfg['label_names'][expected]
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main([*arguments, '--num-classes', '5'])
    assert '--num-classes needs --checkpoint' in capsys.readouterr().err


def test_predict_reports_broken_images_and_continues(tmp_path, capsys):
    checkpoint = tmp_path / 'weights.pth'
    model = timm.create_model('spa_resnet18', num_classes=4).eval()
    torch.save(model.state_dict(), checkpoint)
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff not an image')
    Image.new('RGBA', (50, 40), (200, 100, 0, 128)).save(tmp_path / 'transparent.png')
    (tmp_path / 'empty').mkdir()
    images = [tmp_path / name for name in ('missing.jpg', 'transparent.png', 'broken.jpg', 'empty')]
    arguments = ['predict', *map(str, images), '--model', 'spa_resnet18', '--checkpoint', str(checkpoint),
                 '--num-classes', '4', '--top-k', '9']
    assert timm_spa_cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:2]] == ['transparent.png']
    assert captured.out.count('class ') == 4, 'the model has four classes'
    for name in ('missing.jpg', 'broken.jpg', 'empty'):
        assert any(name in line and 'could not be read' in line for line in captured.err.splitlines())

    assert timm_spa_cli.main([*arguments, '--json']) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [bool(e['error']) for e in entries] == [True, False, True, True]
    probabilities = [c['probability'] for c in entries[1]['classes']]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(('model', 'message'), [
    ('spa_resnet5', "Unknown model 'spa_resnet5'. Did you mean spa_resnet50"),
    ('spa_mobilenetv2_075', 'No pretrained weights exist'),
])
def test_a_model_that_cannot_be_loaded(model, message, capsys):
    assert timm_spa_cli.main(['predict', COFFEE, '--model', model]) == 1
    assert message in capsys.readouterr().err


def test_bad_top_k():
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main(['demo', '--top-k', '0'])


def test_names_of_imagenet_classes():
    names = class_names(timm.create_model('spa_resnet18', device='meta'))
    assert len(names) == 1000
    assert names[285]['label'] == 'n02124075'
    assert names[285]['name'].startswith('Egyptian cat')


def test_a_closed_pipe_prints_no_error():
    command = f'{sys.executable} -m timm_spa list "spa_resnet*" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith('model')
    assert done.stderr == ''


def test_as_a_module_and_as_a_command():
    for command in ([sys.executable, '-m', 'timm_spa'], [Path(sys.executable).parent / 'timm-spa']):
        done = subprocess.run([*command, '--help'], capture_output=True, text=True)
        assert done.returncode == 0
        assert 'demo' in done.stdout


def test_help_does_not_wait_for_torch():
    code = (
        'import sys, timm_spa_cli\n'
        'for arguments in ([], ["--help"], ["--version"], ["predict", "--top-k", "0"], ["bench"]):\n'
        '    try:\n'
        '        timm_spa_cli.main(arguments)\n'
        '    except SystemExit:\n'
        '        pass\n'
        'print("torch" in sys.modules, "timm_spa" in sys.modules)\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == 'False False'
    assert f'timm_spa {timm_spa.__version__}' in done.stdout


def test_examples_are_commands(monkeypatch, capsys):
    """The help of every verb shows a valid example, and the main help explains the exit codes."""
    for verb in timm_spa_cli.VERBS:
        module = importlib.import_module(f'timm_spa_cli.{verb}{"_" * keyword.iskeyword(verb)}')
        monkeypatch.setattr(module, 'run', lambda args: 0)
        with pytest.raises(SystemExit, match='0'):
            timm_spa_cli.main([verb, '--help'])
        shown = capsys.readouterr().out
        for example in module.EXAMPLES:
            program, *arguments = shlex.split(example)
            assert (program, arguments[0]) == ('timm-spa', verb)
            assert timm_spa_cli.main(arguments) == 0
            assert f'\n  {example}\n' in shown
    with pytest.raises(SystemExit, match='0'):
        timm_spa_cli.main(['--help'])
    assert 'Exit code: 0 on success, 1 on failure, 2 on a usage error' in capsys.readouterr().out


def test_an_error_is_printed_as_json(capsys):
    assert timm_spa_cli.main(['predict', COFFEE, '--model', 'spa_resnet5', '--json']) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)['error'] in captured.err


def test_without_an_installation(monkeypatch, capsys):
    """Only the version needs an installation."""
    monkeypatch.setattr(metadata, 'version', lambda name: metadata.distribution('no such package'))
    assert timm_spa_cli.main(['recipes']) == 0
    with pytest.raises(SystemExit, match='0'):
        timm_spa_cli.main(['--version'])
    assert 'timm_spa not installed' in capsys.readouterr().out


def test_errors_are_one_line_and_bugs_ask_for_a_report(monkeypatch, capsys):
    assert timm_spa_cli.main(['convert', 'missing.pth', 'o.safetensors', '--model', 'spa_resnet18']) == 1
    assert capsys.readouterr().err == 'timm-spa: missing.pth does not exist.\n'
    monkeypatch.setattr('timm_spa.hub.verify.verify', lambda *args: 1 / 0)
    assert timm_spa_cli.main(['verify', '.']) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == 'timm-spa: ZeroDivisionError: division by zero'
    assert second.startswith('This is a bug in timm_spa. Please report it')
    with pytest.raises(ZeroDivisionError):
        timm_spa_cli.main(['--traceback', 'verify', '.'])


@pytest.mark.parametrize(('checkpoint', 'message'), [
    ('missing.pth', 'does not exist'), ('.', 'it is a folder'), ('text.pth', 'neither a safetensors file')])
def test_invalid_checkpoints(checkpoint, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.pth').write_text('hello')
    arguments = ['predict', 'x.jpg', '--model', 'spa_resnet18', '--checkpoint']
    assert timm_spa_cli.main([*arguments, checkpoint]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        timm_spa_cli.main([*arguments, ''])
    assert 'argument checkpoint: it is empty' in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [
    'publish w.pth --model spa_resnet18.x --dry-run', 'publish w.pth --model spa_resnet18.x --repo', 'predict',
    'publish w.pth --model spa_resnet18.x --results', 'predict x.jpg --model', 'predict x.jpg --compare',
    'verify', 'recipes finetune_warm --out', 'export spa_resnet18 x.onnx --to onnx --images', 'card', 'bench',
    'detect eval x --images y --annotations', 'explain cam x.jpg --compare spa_resnet18'])
def test_an_empty_argument_is_refused(arguments, capsys):
    """An unset shell variable gives an empty argument: `--dry-run ""` must not upload."""
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main([*arguments.split(), ''])
    err = capsys.readouterr().err
    assert 'it is empty' in err or 'unrecognized arguments' in err


def test_an_interrupt_has_no_traceback(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_spa_cli.list.run', interrupt)
    assert timm_spa_cli.main(['list']) == 130
    assert capsys.readouterr().err == ''


def test_names_cannot_control_a_terminal(tmp_path, capsys):
    model = timm.create_model('spa_mobilenetv2_cifar', num_classes=1)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    (tmp_path / 'classes.txt').write_text('\x1b[31mred\x1b[0m\u202e\u3000ü\n')
    arguments = ['--model', 'spa_mobilenetv2_cifar', '--num-classes', '1', '--checkpoint']
    assert timm_spa_cli.main(['predict', COFFEE, *arguments, str(tmp_path / 'w.pth')]) == 0
    out = capsys.readouterr().out
    assert r'\x1b[31mred\x1b[0m\u202e' in out
    assert '\u3000ü' in out
    assert timm_spa_cli.main(['predict', 'x.jpg', *arguments, '\x1b[31m.pth']) == 1
    assert '\x1b' not in capsys.readouterr().err


def test_an_edited_recipe_is_not_replaced(tmp_path, capsys):
    mine = tmp_path / 'mine.yaml'
    mine.write_text('lr: 0.1\n')
    assert timm_spa_cli.main(['recipes', 'finetune_warm', '--out', str(mine)]) == 1
    assert 'exists already' in capsys.readouterr().err
    assert mine.read_text() == 'lr: 0.1\n'


def test_classes_of_a_checkpoint_get_no_names_of_other_classes(tmp_path):
    """Neither the names of shipped weights with the same number of classes, nor ImageNet's names for 1000 classes."""
    for name, count in (('spa_mobilenetv2_cifar', 200), ('spa_resnet18', 1000)):
        torch.save(timm.create_model(name, num_classes=count).state_dict(), tmp_path / 'own.pth')
        model = load_model(name, tmp_path / 'own.pth', count)
        assert {c['name'] for c in class_names(model)} == {f'class {i}' for i in range(count)}
