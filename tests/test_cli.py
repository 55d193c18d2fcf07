"""The command line, as a user runs it."""
import importlib
import json
import keyword
import shlex
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_unless
from PIL import Image

import timm_spa
import timm_spa_cli
from timm_spa.predict import class_names, load_model
from timm_spa.profile import LIST, describe
from timm_spa_cli.predict import SHIPPED_MODEL, show_predictions

IMAGES = resources.files('timm_spa') / 'images'
PICTURES = sorted(path.name for path in IMAGES.iterdir() if path.name.endswith('.jpg'))


def test_list_counts_what_the_authors_counted(capsys):
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
    assert [*json.loads(LIST.read_text())] == timm_spa.list_models()


@pytest.mark.parametrize('name', slow_unless(timm_spa.list_models()[::8].__contains__, timm_spa.list_models()))
def test_list_says_what_a_model_is(name):
    """Rebuilt by `python -m timm_spa.profile`; another release of timm may have other tags."""
    said, is_now = json.loads(LIST.read_text())[name], describe(name)
    if timm.__version__ != '1.0.31':
        is_now['tags'] = said['tags']
    assert said == is_now


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


def test_list_of_nothing(capsys):
    assert timm_spa_cli.main(['list', 'resnet50']) == 1
    assert "no model of this package is called 'resnet50'" in capsys.readouterr().err


def test_demo(capsys, tmp_path):
    named = tmp_path / 'mine.jpg'
    named.write_bytes((IMAGES / 'Red-Beet.jpg').read_bytes())
    assert timm_spa_cli.main(['demo', str(named), '--top-k', '1']) == 0
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first == f'{SHIPPED_MODEL}: {timm.get_pretrained_cfg(SHIPPED_MODEL).description}'
    cells = [row.split() for row in rows[:rows.index('')]]
    assert [row[0] for row in cells] == [*PICTURES, 'mine.jpg']
    for name, verdict, _, said in cells[:-1]:
        assert verdict == ('right' if said == name.removesuffix('.jpg') else 'wrong')
    assert cells[-1][1:] == cells[PICTURES.index('Red-Beet.jpg')][2:], 'what the user shows has no verdict'
    assert 'attention neutral' in rows[-1]


def test_a_wrong_answer_is_called_wrong(capsys):
    path = str(IMAGES / 'Red-Beet.jpg')
    show_predictions(load_model(SHIPPED_MODEL), [path], {path: 'Anjou'}, 1)
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ['Red-Beet.jpg', 'wrong']


def test_the_shipped_pictures_were_not_chosen_by_what_a_net_says():
    labels = timm.get_pretrained_cfg(SHIPPED_MODEL).label_names
    assert [f'{label}.jpg' for label in labels[:80:10]] == PICTURES


def test_predict_by_the_shipped_model(capsys):
    arguments = ['predict', str(IMAGES / 'Red-Beet.jpg')]
    assert timm_spa_cli.main([*arguments, '--json']) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f'{SHIPPED_MODEL}: ')
    assert json.loads(captured.out)[0]['classes'][0]['label'] == 'Red-Beet'
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main([*arguments, '--num-classes', '5'])
    assert '--num-classes needs --checkpoint' in capsys.readouterr().err


def test_predict_reports_broken_pictures_and_goes_on(tmp_path, capsys):
    checkpoint = tmp_path / 'weights.pth'
    model = timm.create_model('spa_resnet18', num_classes=4).eval()
    torch.save(model.state_dict(), checkpoint)
    (tmp_path / 'broken.jpg').write_bytes(b'\xff\xd8\xff no picture')
    Image.new('RGBA', (50, 40), (200, 100, 0, 128)).save(tmp_path / 'transparent.png')
    (tmp_path / 'empty').mkdir()
    pictures = [tmp_path / name for name in ('missing.jpg', 'transparent.png', 'broken.jpg', 'empty')]
    arguments = ['predict', *map(str, pictures), '--model', 'spa_resnet18', '--checkpoint', str(checkpoint),
                 '--num-classes', '4', '--top-k', '9']
    assert timm_spa_cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()[1:2]] == ['transparent.png']
    assert captured.out.count('class ') == 4, 'there are no more than four classes'
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
    assert timm_spa_cli.main(['predict', str(IMAGES / 'Red-Beet.jpg'), '--model', model]) == 1
    assert message in capsys.readouterr().err


def test_bad_top_k():
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main(['demo', '--top-k', '0'])


def test_names_of_imagenet_classes():
    names = class_names(timm.create_model('spa_resnet18', device='meta'))
    assert len(names) == 1000
    assert names[285]['label'] == 'n02124075'
    assert names[285]['name'].startswith('Egyptian cat')


def test_a_closed_pipe_is_no_error_to_show():
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
    """Every verb's help has one that the verb understands, and the whole says what the exit codes are."""
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
    assert 'Exit code: 0 if all was done, 1 if' in capsys.readouterr().out


def test_an_error_is_json_where_the_answer_would_be(capsys):
    assert timm_spa_cli.main(['predict', str(IMAGES / 'Red-Beet.jpg'), '--model', 'spa_resnet5', '--json']) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)['error'] in said.err


def test_without_an_installation(monkeypatch, capsys):
    """Only the version needs one."""
    monkeypatch.setattr(metadata, 'version', lambda name: metadata.distribution('no such package'))
    assert timm_spa_cli.main(['recipes']) == 0
    with pytest.raises(SystemExit, match='0'):
        timm_spa_cli.main(['--version'])
    assert 'timm_spa not installed' in capsys.readouterr().out


def test_an_error_of_ours_is_a_line_and_a_bug_says_so(monkeypatch, capsys):
    assert timm_spa_cli.main(['convert', 'missing.pth', 'o.safetensors', '--model', 'spa_resnet18']) == 1
    assert capsys.readouterr().err == 'timm-spa: missing.pth does not exist.\n'
    monkeypatch.setattr('timm_spa.hub.verify.verify', lambda *args: 1 / 0)
    assert timm_spa_cli.main(['verify', '.']) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == 'timm-spa: ZeroDivisionError: division by zero'
    assert 'please report' in second
    with pytest.raises(ZeroDivisionError):
        timm_spa_cli.main(['--traceback', 'verify', '.'])


@pytest.mark.parametrize(('checkpoint', 'message'), [
    ('missing.pth', 'does not exist'), ('.', 'it is a folder'), ('text.pth', 'neither a safetensors file')])
def test_checkpoints_that_are_none(checkpoint, message, tmp_path, monkeypatch, capsys):
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
    'verify', 'recipes finetune_warm --to', 'export spa_resnet18 x.onnx --to onnx --images', 'card', 'bench',
    'detect eval x --images y --annotations', 'explain cam x.jpg --compare spa_resnet18'])
def test_an_empty_argument_is_refused(arguments, capsys):
    """It comes of a variable of the shell that is not set: `--dry-run ""` must not upload."""
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


def test_names_cannot_steer_a_terminal(tmp_path, capsys):
    model = timm.create_model('spa_mobilenetv2_cifar', num_classes=1)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    (tmp_path / 'classes.txt').write_text('\x1b[31mred\x1b[0m\u202e\u3000ü\n')
    arguments = ['--model', 'spa_mobilenetv2_cifar', '--num-classes', '1', '--checkpoint']
    assert timm_spa_cli.main(['predict', str(IMAGES / PICTURES[0]), *arguments, str(tmp_path / 'w.pth')]) == 0
    out = capsys.readouterr().out
    assert r'\x1b[31mred\x1b[0m\u202e' in out
    assert '\u3000ü' in out
    assert timm_spa_cli.main(['predict', 'x.jpg', *arguments, '\x1b[31m.pth']) == 1
    assert '\x1b' not in capsys.readouterr().err


def test_a_recipe_that_was_changed_is_not_replaced(tmp_path, capsys):
    mine = tmp_path / 'mine.yaml'
    mine.write_text('lr: 0.1\n')
    assert timm_spa_cli.main(['recipes', 'finetune_warm', '--to', str(mine)]) == 1
    assert 'is there already' in capsys.readouterr().err
    assert mine.read_text() == 'lr: 0.1\n'


def test_classes_of_a_checkpoint_have_no_names_of_others(tmp_path):
    """Not those of the shipped weights for as many classes, and not ImageNet's for a thousand."""
    for name, count in (('spa_mobilenetv2_cifar', 200), ('spa_resnet18', 1000)):
        torch.save(timm.create_model(name, num_classes=count).state_dict(), tmp_path / 'own.pth')
        model = load_model(name, tmp_path / 'own.pth', count)
        assert {c['name'] for c in class_names(model)} == {f'class {i}' for i in range(count)}
