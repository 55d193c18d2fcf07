"""Verbs replace files of the user only with --overwrite, and the same command works twice."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import timm
import yaml
from published import CARDS, FILES, NAME, SHIPPED

import timm_spa_cli
from timm_spa.checkpoints import files as _files
from timm_spa.checkpoints.files import WriteError, replacing
from timm_spa.detection import retinanet, save_detector
from timm_spa.detection.checkpoint import is_own
from timm_spa.detection.repository import write_detector_repository
from timm_spa.hub import publish as publish_module
from timm_spa.hub.publish import PublishError, write_repository
from timm_spa.hub.verify import verify
from timm_spa.predict import sample_image

COFFEE = sample_image('coffee')


def main(*arguments):
    return timm_spa_cli.main([*map(str, arguments)])


@pytest.fixture
def run(tmp_path):
    """A folder of a training run, with a card.yaml that its owner wrote."""
    run = tmp_path / 'run'
    run.mkdir()
    shutil.copy(SHIPPED, run / 'best.safetensors')
    for name in ('args.yaml', 'summary.csv', 'run.json', 'scales.png'):
        shutil.copy(CARDS / name, run)
    run.joinpath('card.yaml').write_text('# mine\n' + (CARDS / 'card.yaml').read_text())
    return run


def dry_run(run, folder, *options):
    return main('publish', run / 'best.safetensors', '--model', NAME, '--dry-run', folder, *options)


def test_publish_keeps_files_of_the_user(run, tmp_path, capsys):
    out = tmp_path / 'out'
    out.mkdir()
    for name in FILES:
        (out / name).write_text('mine: 1')
        assert dry_run(run, out) == 1
        error = capsys.readouterr().err
        assert f'{out} is not a folder that `timm-spa publish` wrote, and has {name}, which would be' in error
        assert error.count('\n') == 1
        assert {p.name: p.read_text() for p in out.iterdir()} == {name: 'mine: 1'}
        (out / name).unlink()
    for name in ('README.md', 'config.json'):
        (out / name).write_text('mine: 1')
    (out / 'notes.txt').write_text('kept')
    assert dry_run(run, out, '--overwrite') == 0
    assert verify(out).problems == []
    assert (out / 'notes.txt').read_text() == 'kept'
    (out / 'README.md').write_text('my own card')
    assert dry_run(run, out) == 0, 'the same command again'
    assert (out / 'README.md').read_text() == 'my own card'
    assert json.loads((out / 'config.json').read_text())['written_by'] == 'timm_spa'


def test_card_yaml_is_never_replaced(run, tmp_path, capsys):
    out = tmp_path / 'out'
    out.mkdir()
    shutil.copy(run / 'card.yaml', out)
    assert dry_run(run, out) == 0
    assert dry_run(run, out, '--overwrite', '--replace-card') == 0
    assert (out / 'card.yaml').read_text().startswith('# mine\n')
    facts = yaml.safe_load((out / 'card.yaml').read_text())
    (out / 'card.yaml').write_text(yaml.safe_dump(dict(facts, about='Something else.')))
    before = (out / 'card.yaml').read_bytes()
    assert dry_run(run, out, '--overwrite') == 1, 'the card would say something else than its card.yaml'
    assert 'card.yaml says something else than the card.yaml of the checkpoint' in capsys.readouterr().err
    assert (out / 'card.yaml').read_bytes() == before


def test_the_folder_of_the_training_is_not_the_repository(run, capsys):
    """Its args.yaml contains local paths, which a repository must not contain."""
    args = run / 'args.yaml'
    args.write_text(args.read_text() + '\nlog_dir: /somewhere/else\n')
    before = args.read_text()
    assert dry_run(run, run) == 1
    assert 'args.yaml, summary.csv, run.json, scales.png, which would be replaced' in capsys.readouterr().err
    assert args.read_text() == before


def test_publish_into_the_working_folder_and_through_a_link(run, tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    (tmp_path / 'link').symlink_to('here')
    monkeypatch.chdir(tmp_path / 'here')
    (tmp_path / 'here' / 'notes.txt').write_text('mine')
    for name in ('.', tmp_path / 'link', tmp_path / 'here'):
        assert dry_run(run, name) == 0
        assert verify('.').problems == []
    assert (tmp_path / 'link').is_symlink()
    assert not [*tmp_path.glob('.*'), *tmp_path.glob('here/.*')]


def test_from_the_weights_of_the_folder_itself(run, tmp_path):
    out = tmp_path / 'out'
    assert dry_run(run, out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main('publish', out / 'model.safetensors', '--model', NAME, '--dry-run', out) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    # after a kill during the replacement: the earlier files are in a hidden folder
    lost = out / f'{_files.STAGING}1-a{_files.OLD}'
    lost.mkdir()
    (out / 'model.safetensors').rename(lost / 'model.safetensors')
    assert any('was killed while it replaced files' in problem for problem in verify(out).problems)
    assert main('publish', out / 'model.safetensors', '--model', NAME, '--dry-run', out) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_target_that_is_not_a_folder(run, tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    for target in (tmp_path / 'file', tmp_path / 'file' / 'below', '/dev/null'):
        assert dry_run(run, target, '--overwrite') == 1
        error = capsys.readouterr().err
        assert 'cannot be written' in error
        assert 'bug' not in error
    assert (tmp_path / 'file').read_text() == 'mine'


def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch, capsys):
    (tmp_path / 'out').mkdir()
    mkdir = os.mkdir

    def refused(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path / 'out')):
            raise PermissionError(13, 'Permission denied')
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, 'mkdir', refused)
    assert dry_run(run, tmp_path / 'out') == 1
    assert 'out cannot be written: Permission denied' in capsys.readouterr().err
    assert not list((tmp_path / 'out').iterdir())


def test_two_publish_at_the_same_time(run, tmp_path):
    """Weights and configuration come from the same call."""
    other = tmp_path / 'other'
    with open(run / 'card.yaml', 'a') as f:
        f.write('license: apache-2.0\n')
    shutil.copytree(run, other)
    state = safetensors.torch.load_file(SHIPPED)
    safetensors.torch.save_file({k: v * 0 for k, v in state.items()}, other / 'best.safetensors')
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write_repository, tmp_path / 'out', folder / 'best.safetensors', name) for folder, name in (
            (run, 'spa_mobilenetv2_cifar.a'), (other, 'spa_mobilenetv2_cifar.b'))]
        for job in jobs:
            assert job.result()
    assert not list((tmp_path / 'out').glob('.*'))
    tag = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']['tag']
    weights = safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors')
    assert weights['classifier.weight'].any() == (tag == 'a')


def test_an_interrupted_publish_leaves_the_folder(run, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    assert dry_run(run, out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(publish_module, 'make_card', interrupt)
    assert dry_run(run, out, '--replace-card') == 130
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert dry_run(run, tmp_path / 'new', '--replace-card') == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'run']


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_publish_that_is_stopped_at_any_moment(run, tmp_path, number):
    """Publish works after it was stopped at several moments."""
    out = tmp_path / 'out'
    command = [sys.executable, '-m', 'timm_spa', 'publish', str(run / 'best.safetensors'), '--model', NAME,
               '--dry-run', str(out)]
    for wait in (3, 4, 5, 6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(number)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert verify(out).problems == []


def test_card_replaces_only_its_own(run, tmp_path, capsys):
    out = tmp_path / 'out'
    assert dry_run(run, out) == 0
    (out / 'README.md').write_text('edited')
    assert main('card', out, '--write') == 0
    config = json.loads((out / 'config.json').read_text())
    del config['written_by']
    (out / 'config.json').write_text(json.dumps(config))
    (out / 'README.md').write_text('mine')
    capsys.readouterr()
    assert main('card', out, '--write') == 1
    assert 'README.md exists already. Add --overwrite to replace it' in capsys.readouterr().err
    assert (out / 'README.md').read_text() == 'mine'
    assert main('card', out, '--write', '--overwrite') == 0
    assert (out / 'README.md').read_text().startswith('---')


def test_a_detector_does_not_replace_a_classifier(tmp_path, capsys):
    model = retinanet('spa_mobilenetv2_050', 1, pretrained_backbone=False, min_size=64, max_size=64)
    categories = [dict(id=1, name='cat')]
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(dict(architecture='bert', written_by='timm_spa')))
    with pytest.raises(WriteError, match=r'config.json exists already. Add --overwrite'):
        save_detector(model, folder, categories)
    save_detector(model, folder, categories, overwrite=True)
    assert is_own(folder)
    save_detector(model, folder, categories)
    (folder / 'card.yaml').write_text('license: mit')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'README.md').write_text('mine')
    assert main('publish', folder, '--dry-run', tmp_path / 'out') == 1
    assert 'has README.md, which would be replaced' in capsys.readouterr().err
    for options in (['--overwrite'], []):
        assert main('publish', folder, '--dry-run', tmp_path / 'out', *options) == 0
    assert (tmp_path / 'out' / 'README.md').read_text().startswith('---')
    (tmp_path / 'out' / 'card.yaml').write_text('license: apache-2.0')
    with pytest.raises(PublishError, match='says something else'):
        write_detector_repository(tmp_path / 'out', folder)


def existing(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('mine')
    return [folder / name for name in names]


def test_recipes_and_bench(tmp_path, capsys, monkeypatch):
    path, = existing(tmp_path, 'mine.yaml')
    assert main('recipes', 'finetune_warm', '--out', path) == 1
    assert path.read_text() == 'mine'
    assert main('recipes', 'finetune_warm', '--out', path, '--overwrite') == 0
    assert path.read_text() != 'mine'
    path, = existing(tmp_path, 'bench.json')
    monkeypatch.setattr('timm_spa.benchmark.measure', lambda *args: pytest.fail('measured before the file was refused'))
    assert main('bench', 'spa_resnet18', '--out', path) == 1
    assert 'bench.json exists already. Add --overwrite' in capsys.readouterr().err
    assert path.read_text() == 'mine'


@pytest.mark.parametrize(('arguments', 'names'), [
    (['scales'], ['scales.csv', 'scales.png', 'scales.svg']),
    (['gates', COFFEE, '--blocks', 'blocks.6.0'],
     ['coffee-gates.csv', 'coffee-gates.png', 'coffee-gates.svg']),
    (['cam', COFFEE], ['cam.csv', 'cam.png', 'cam.svg']),
    (['curves', CARDS], ['curves.csv', 'curves.png', 'curves.svg']),
], ids=lambda value: str(value[0]))
def test_explain(arguments, names, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    for name in names:
        path, = existing(tmp_path, name)
        assert main('explain', *arguments, '--out', tmp_path) == 1
        assert f'{name} exists already. Add --overwrite' in capsys.readouterr().err
        assert os.listdir(tmp_path) == [name]
        assert path.read_text() == 'mine'
        path.unlink()
    existing(tmp_path, *names)
    assert main('explain', *arguments, '--out', tmp_path, '--overwrite') == 0
    assert main('explain', *arguments, '--out', tmp_path) == 0, 'the same command again'
    assert all((tmp_path / name).read_bytes() != b'mine' for name in names)


def test_detect(tmp_path, capsys):
    """Files of the user are refused before the computation, and results of an earlier call are replaced."""
    model = retinanet('spa_mobilenetv2_050', 1, pretrained_backbone=False, min_size=64, max_size=64)
    save_detector(model, tmp_path / 'detector', [dict(id=1, name='cat')])
    command = ['detect', 'predict', COFFEE, '--checkpoint', tmp_path / 'detector', '--device', 'cpu']
    for name in ('coffee-boxes.png', 'detector.json'):
        folder = tmp_path / name
        path, = existing(folder, name)
        assert main(*command, '--out', folder) == 1
        assert f'{name} exists already. Add --overwrite' in capsys.readouterr().err
        assert path.read_text() == 'mine'
        for options in (['--overwrite'], [], ['--score', 0.01]):
            assert main(*command, '--out', folder, *options) == 0
    path, = existing(tmp_path, 'results.json')
    arguments = ['--images', COFFEE.parent, '--annotations', tmp_path / 'none.json', '--out', path, '--device', 'cpu']
    assert main('detect', 'eval', tmp_path / 'detector', *arguments) == 1
    assert 'results.json exists already' in capsys.readouterr().err


@pytest.mark.parametrize('name', [
    'args.yaml', 'summary.csv', 'best/model.safetensors', 'best/config.json', 'last/config.json'])
def test_detect_train(name, tmp_path, capsys):
    path, = existing(tmp_path, name)
    assert main('detect', 'train', '--data', tmp_path / 'none', '--output', tmp_path) == 1
    assert f'{name} exists already. Add --overwrite' in capsys.readouterr().err
    assert path.read_text() == 'mine'
    assert main('detect', 'train', '--data', tmp_path / 'none', '--output', tmp_path, '--overwrite') == 1
    assert 'exists already' not in capsys.readouterr().err, 'the dataset is missing'


def test_a_detector_run_that_failed_in_its_first_epoch_can_be_repeated(tmp_path, capsys):
    (tmp_path / 'args.yaml').write_text('detector: retinanet\nsettings: {epochs: 1}\n')
    assert main('detect', 'train', '--data', tmp_path / 'none', '--output', tmp_path) == 1
    assert 'exists already' not in capsys.readouterr().err


def test_overwrite_needs_a_file_to_write(capsys):
    for arguments in (['publish', 'x.pth', '--model', NAME, '--overwrite'], ['card', 'x', '--overwrite']):
        with pytest.raises(SystemExit):
            main(*arguments)
        assert '--overwrite goes with --' in capsys.readouterr().err


def test_timm_ignores_the_mark(run, tmp_path):
    assert dry_run(run, tmp_path / 'out') == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert 'written_by' not in model.pretrained_cfg


def test_a_pipe_in_a_folder_stays(tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    os.mkfifo(folder / 'a.txt')

    def write(partial):
        partial.mkdir()
        (partial / 'a.txt').write_text('x')

    with pytest.raises(WriteError, match=r'a.txt cannot be written: it is not a regular file'), \
            replacing(folder) as partial:
        write(partial)
