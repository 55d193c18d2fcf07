"""The runner of timm's scripts: finding, downloading and running a script."""
import hashlib
import http.client
import http.server
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import timm
import torch

from timm_spa._errors import UsageError
from timm_spa.training import runner as run

SCRIPT = b'''
import sys
import timm
print("arguments", sys.argv[1:])
print("models", len(timm.list_models("spa_*")))
print("name", __name__, "file", __file__)
sys.exit(3 if "fail" in sys.argv else 0)
'''


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    return tmp_path / 'cache' / 'timm_spa' / 'scripts' / run.SCRIPTS_TAG


@pytest.fixture
def site(monkeypatch):
    """A server with one script, whose digest is the expected one."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            requests.append(self.path)
            exists = self.path.endswith('/train.py')
            self.send_response(200 if exists else 404)
            self.end_headers()
            self.wfile.write(SCRIPT if exists else b'not here')

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(run, 'SCRIPTS_URL', f'http://127.0.0.1:{server.server_port}/{{tag}}/{{name}}.py')
    monkeypatch.setitem(run.SHA256, 'train', hashlib.sha256(SCRIPT).hexdigest())
    yield requests
    server.shutdown()


def test_digests_are_those_of_the_tag():
    assert set(run.SHA256) == {
        'avg_checkpoints', 'benchmark', 'clean_checkpoint', 'inference', 'onnx_export', 'onnx_validate', 'train',
        'validate'}
    assert all(len(d) == 64 for d in run.SHA256.values())
    assert run.SHA256['train'].startswith('1fb02d26fe16')


def test_downloaded_once_and_kept(cache, site):
    assert run.find_script('train') == cache / 'train.py'
    assert run.find_script('train').read_bytes() == SCRIPT
    assert site == ['/v1.0.28/train.py']
    assert [p.name for p in cache.iterdir()] == ['train.py'], 'no partial file remains'


def test_damaged_cache_is_downloaded_again(cache, site):
    cache.mkdir(parents=True)
    (cache / 'train.py').write_bytes(SCRIPT[:20])
    assert run.find_script('train').read_bytes() == SCRIPT


def test_script_with_wrong_digest_is_not_stored(cache, site, monkeypatch, capsys):
    monkeypatch.setitem(run.SHA256, 'train', '0' * 64)
    assert run.main(['train']) == 2
    message = capsys.readouterr().err
    assert f'not stored: its SHA-256 is {hashlib.sha256(SCRIPT).hexdigest()}, expected {"0" * 64}' in message
    assert '--timm-scripts or TIMM_SCRIPTS' in message
    assert not (cache / 'train.py').exists()


def test_another_tag_is_recorded_and_compared(cache, site, monkeypatch, capsys):
    other = cache.parent / 'v1.0.31' / 'train.py'
    assert run.find_script('train', 'v1.0.31') == other
    assert f'recorded SHA-256 {hashlib.sha256(SCRIPT).hexdigest()}' in capsys.readouterr().err
    assert run.find_script('train', 'v1.0.31') == other
    assert site == ['/v1.0.31/train.py']
    other.write_bytes(b'changed')
    assert run.find_script('train', 'v1.0.31').read_bytes() == SCRIPT, 'downloaded again'
    assert capsys.readouterr().err == ''
    other.with_suffix('.sha256').write_text('0' * 64)
    monkeypatch.setenv('TIMM_SCRIPTS', 'v1.0.31')
    assert run.main(['train']) == 2
    assert f'expected {"0" * 64}' in capsys.readouterr().err
    assert not cache.exists(), 'nothing of the default tag is downloaded'


@pytest.mark.parametrize('text', ['', '\n', 'x' * 64, '0' * 63])
def test_empty_or_damaged_record_is_ignored(cache, site, capsys, text):
    other = cache.parent / 'v1.0.31' / 'train.py'
    other.parent.mkdir(parents=True)
    other.write_bytes(b'changed')
    other.with_suffix('.sha256').write_text(text)
    assert run.find_script('train', 'v1.0.31').read_bytes() == SCRIPT
    assert 'recorded' in capsys.readouterr().err
    assert other.with_suffix('.sha256').read_text().strip() == hashlib.sha256(SCRIPT).hexdigest()
    run.find_script('train', 'v1.0.31')
    assert site == ['/v1.0.31/train.py']


@pytest.mark.parametrize(('name', 'error', 'end'), [
    ('train', 'timm_spa.training.guard.TrainingError', 'Stopped.'),
    ('train', 'timm_spa.checkpoints.hub_files.HubWeightsError', 'Stopped. With train.py, use --pretrained-path FILE.'),
    ('validate', 'timm_spa.checkpoints.hub_files.HubWeightsError', 'Stopped. With validate.py, use --checkpoint FILE.'),
    ('benchmark', 'timm_spa.checkpoints.hub_files.HubWeightsError', 'Stopped.')])
def test_error_of_a_script_is_one_message(tmp_path, capsys, monkeypatch, name, error, end):
    monkeypatch.setattr(sys, 'argv', [])
    (tmp_path / f'{name}.py').write_text(
        f'import {error.rpartition(".")[0]}\nimport timm_spa\nraise {error}("Stopped.")')
    assert run.main([name, '--timm-scripts', str(tmp_path)]) == 1
    assert capsys.readouterr().err == f'timm_spa.run: {end}\n'


def test_missing_package_of_a_script(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])
    (tmp_path / 'inference.py').write_text('import no_such_package\n')
    assert run.main(['inference', '--timm-scripts', str(tmp_path)]) == 1
    assert "inference.py needs the package 'no_such_package', which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['train', 'validate'])
def test_failed_download(cache, site, monkeypatch, capsys, name):
    if name == 'train':
        monkeypatch.setattr(run, 'SCRIPTS_URL', 'http://127.0.0.1:9/{tag}/{name}.py')
    assert run.main([name]) == 2
    message = capsys.readouterr().err
    assert 'Could not download http://127.0.0.1' in message
    assert f'Download {name}.py of timm v1.0.28 another way' in message
    assert '--timm-scripts or TIMM_SCRIPTS' in message


def test_interrupted_download(cache, site, monkeypatch, capsys):
    def cut_off(*args, **kwargs):
        raise http.client.IncompleteRead(b'x', 97)

    monkeypatch.setattr(run.urllib.request, 'urlopen', cut_off)
    assert run.main(['train']) == 2
    assert 'Could not download' in capsys.readouterr().err


def test_unwritable_cache(cache, site, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    assert run.main(['train']) == 2
    message = capsys.readouterr().err
    assert 'train.py cannot be stored in the cache' in message
    assert 'XDG_CACHE_HOME' in message


def test_given_paths_come_first(cache, site, tmp_path, monkeypatch):
    (tmp_path / 'train.py').touch()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'train.py').touch()
    assert run.find_script('train', str(tmp_path)) == tmp_path / 'train.py'
    assert run.find_script('train', str(tmp_path / 'train.py')) == tmp_path / 'train.py'
    monkeypatch.setenv('TIMM_SCRIPTS', str(tmp_path))
    assert run.find_script('train') == tmp_path / 'train.py'
    assert run.find_script('train', str(tmp_path / 'other')) == tmp_path / 'other' / 'train.py'
    assert site == []
    for path in (tmp_path / 'none', tmp_path / 'train.py'):
        with pytest.raises(UsageError, match=r'validate\.py not found: .* is neither this file nor a folder with it'):
            run.find_script('validate', str(path))


@pytest.mark.parametrize(('argv', 'message'), [
    (['sweep'], "Unknown script 'sweep'. Choose one of avg_checkpoints"),
    (['train', '--timm-scripts'], '--timm-scripts needs a path or a tag'),
])
def test_bad_arguments(argv, message, capsys):
    assert run.main(argv) == 2
    assert message in capsys.readouterr().err


def test_usage(capsys):
    assert run.main(['--help']) == 0
    assert 'usage: python -m timm_spa.run' in capsys.readouterr().out
    assert run.main([]) == 2


@pytest.mark.parametrize('launcher', [[], pytest.param(
    ['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1'], marks=pytest.mark.slow)])
def test_runs_the_script_as_main_with_our_models(tmp_path, launcher):
    """Directly and under `accelerate launch`: arguments and exit code are passed on, --timm-scripts is removed."""
    (tmp_path / 'train.py').write_bytes(SCRIPT)
    for arguments, code in ((['--model', 'x', '--timm-scripts', str(tmp_path), '-j', '2'], 0),
                            ([f'--timm-scripts={tmp_path}', 'fail'], 3)):
        done = subprocess.run(
            [sys.executable, *launcher, '-m', 'timm_spa.run', 'train', *arguments], capture_output=True, text=True)
        expected = [a for a in arguments if str(tmp_path) not in a and a != '--timm-scripts']
        assert f'arguments {expected}' in done.stdout
        assert 'models 0' not in done.stdout
        assert f'name __main__ file {tmp_path / "train.py"}' in done.stdout
        assert (done.returncode == code) or (launcher and done.returncode == 1 and code)


@pytest.mark.parametrize(('name', 'options'), [
    pytest.param('spa_resnet18', [], marks=pytest.mark.slow),
    pytest.param('spa_resnet18', ['--reparam'], marks=pytest.mark.slow), ('spa_mobilenetv2_cifar', ['--dynamic-size'])])
def test_onnx_export_of_timm(timm_scripts, name, options, tmp_path):
    """timm's onnx_export.py at its defaults, with the fused form, and with a free batch and size."""
    onnxruntime = pytest.importorskip('onnxruntime')
    path, weights = tmp_path / 'model.onnx', tmp_path / 'weights.pth'
    torch.save(timm.create_model(name, num_classes=7).state_dict(), weights)
    subprocess.run(
        [sys.executable, '-m', 'timm_spa.run', 'onnx_export', '--timm-scripts', str(timm_scripts), str(path), '--model',
         name, '--checkpoint', str(weights), '--num-classes', '7', '--check-forward', *options], check=True)
    session = onnxruntime.InferenceSession(path)
    shape = [n if isinstance(n, int) else 37 for n in session.get_inputs()[0].shape]
    logits, = session.run(None, {session.get_inputs()[0].name: np.zeros(shape, 'float32')})
    assert np.isfinite(logits).all()


@pytest.mark.slow
def test_timms_scripts_run_with_our_models(timm_scripts, tmp_path, monkeypatch):
    """Two epochs of timm's train.py on a few images, then its validate.py on the checkpoint, also fused."""
    from PIL import Image

    monkeypatch.setenv('TIMM_SCRIPTS', str(timm_scripts))

    for split in ('train', 'validation'):
        for label, colour in (('dark', 40), ('light', 200)):
            folder = tmp_path / 'data' / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new('RGB', (40, 40), (colour + i, colour, colour)).save(folder / f'{i}.png')
    common = [
        '--data-dir', str(tmp_path / 'data'), '--model', 'spa_mobilenetv2_cifar', '--num-classes', '2',
        '--device', 'cpu', '--workers', '0']
    run_script = [sys.executable, '-m', 'timm_spa.run']
    recipe = os.path.join(os.path.dirname(__file__), '..', 'train_scripts', 'recipes', 'tmm_small_image.yaml')
    subprocess.run(
        [*run_script, 'train', *common, '--config', recipe, '--epochs', '2', '--batch-size', '8', '--val-split',
         'validation', '--output', str(tmp_path), '--experiment', 'run'], check=True)
    assert (tmp_path / 'run' / 'summary.csv').read_text().count('\n') == 3
    for options in ([], ['--reparam']):
        done = subprocess.run(
            [*run_script, 'validate', *common, '--split', 'validation', '--checkpoint',
             str(tmp_path / 'run' / 'model_best.pth.tar'), *options], check=True, capture_output=True, text=True)
        assert 'Acc@1' in done.stdout + done.stderr
