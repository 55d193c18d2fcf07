"""Command-line options that several verbs share: one name and meaning each, and the old names still work."""
import contextlib
import json
import re
import socket

import pytest

import timm_spa_cli
from timm_spa import benchmark
from timm_spa.explain import app
from timm_spa.predict import default_split
from timm_spa_cli import export


def parsed(monkeypatch, module, *arguments):
    """Returns the parsed arguments of a verb, without running it."""
    seen = []
    monkeypatch.setattr(module, 'run', lambda args: seen.append(args) or 0)
    assert timm_spa_cli.main([module.__name__.rpartition('.')[2], *arguments]) == 0
    return seen[0]


@pytest.mark.parametrize('arguments', [
    ['spa_resnet18', 'x.onnx'], ['spa_resnet18', '--dynamic', 'batch', 'x.onnx'], ['x.onnx', '--model', 'spa_resnet18'],
    ['--model', 'spa_resnet18', 'x.onnx'], ['--dynamic', 'batch', 'spa_resnet18', 'x.onnx']])
def test_export_takes_the_model_in_both_ways(arguments, monkeypatch):
    args = parsed(monkeypatch, export, *arguments)
    assert (args.model or args.named, args.output) == ('spa_resnet18', 'x.onnx')


def test_export_formats(capsys):
    from timm_spa.export.exporter import FORMATS

    assert {name: fmt.suffix for name, fmt in FORMATS.items()} == export.FORMATS
    assert [export._format(name) for name in ('a.onnx', 'a.mlpackage', 'a.pt2', 'a')] == ['onnx', 'coreml', None, None]
    for arguments, message in (
            (['m', 'x.pt2'], 'x.pt2: the suffix does not determine the format. Add --to torch-export or --to aoti'),
            (['m', 'x.onnx', '--model', 'n'], 'two models: m and --model n'), (['--model', 'n'], 'required: OUT')):
        with pytest.raises(SystemExit, match='2'):
            timm_spa_cli.main(['export', *arguments])
        assert message in capsys.readouterr().err


def test_the_split_is_test_if_it_exists(tmp_path):
    for existing, expected in ((None, 'test'), ('val', 'val'), ('validation', 'validation'), ('test', 'test')):
        if existing:
            (tmp_path / existing).mkdir()
        assert default_split(tmp_path) == expected


@pytest.mark.parametrize(('arguments', 'models', 'file', 'as_json'), [
    (['a', 'b', '--out', 'x.json'], ['a', 'b'], 'x.json', None),
    (['a', '--model', 'b'], ['a', 'b'], None, None),
    (['a', '--json'], ['a'], None, True),
    (['--json', 'a', 'b'], ['a', 'b'], None, True),
    (['a', '--json', 'x.json'], ['a'], 'x.json', None)])
def test_models_and_files_of_bench(arguments, models, file, as_json, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    record = dict(models=models)
    monkeypatch.setattr(benchmark, 'measure', lambda models, *args: dict(models=models))
    monkeypatch.setattr(benchmark, 'table_rows', lambda record: [('table',)] * 2)
    monkeypatch.setattr(benchmark, 'notes', lambda record: [])
    assert timm_spa_cli.main(['bench', *arguments]) == 0
    captured = capsys.readouterr()
    assert ('deprecated' in captured.err) == ('x.json' in arguments and '--json' in arguments)
    if file:
        assert json.loads((tmp_path / file).read_text()) == record
        assert captured.out.endswith('Wrote x.json.\n')
    elif as_json:
        assert json.loads(captured.out) == record
    else:
        assert 'table' in captured.out


@pytest.mark.parametrize(('arguments', 'new'), [
    (['recipes', 'finetune_warm', '--to', 'x.yaml'], '--out'),
    (['detect', 'eval', 'x', '--images', 'y', '--json', 'z'], '--annotations'),
    (['detect', 'eval', 'x', '--images', 'y', '--annotations', 'z', '--results', 'r'], '--out'),
    (['detect', 'train', '--output', 'x', '--train-json', 'z', '--train-images', 'i'], '--train-annotations')])
def test_old_names_of_options(arguments, new, tmp_path, monkeypatch, capsys):
    """They are not in the help, and print the new name."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        timm_spa_cli.main(arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'deprecated' in line]
    old = next(word for word in arguments if f' {word} is' in line)
    assert line == f'timm-spa: {old} is deprecated and will be removed in version 0.3. Use {new}.'
    verb = arguments[:2] if arguments[0] == 'detect' else arguments[:1]
    with pytest.raises(SystemExit, match='0'):
        timm_spa_cli.main([*verb, '--help'])
    shown = capsys.readouterr().out
    assert re.search(rf'{new}\b', shown)
    assert not re.search(rf'{old}\b', shown)


def test_an_address_that_cannot_be_used(monkeypatch, capsys):
    """A message of our own, before Gradio is started: its message names options that we do not have."""
    monkeypatch.setattr(app, 'build', lambda models: pytest.fail('the page was built'))
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        port = server.getsockname()[1]
        assert timm_spa_cli.main(['app', '--port', str(port)]) == 1
    assert capsys.readouterr().err == (
        f'timm-spa: The page cannot be served at 127.0.0.1, port {port}: another program uses this port. Choose '
        'another --port, or leave it out for the first free one.\n')

    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    assert timm_spa_cli.main(['app', '--host', 'nowhere']) == 1
    assert capsys.readouterr().err == (
        'timm-spa: The page cannot be served at nowhere: Name or service not known. Choose another --host or --port.\n')
