"""Preparation of image folders: exact pixels, broken images, interruptions."""
import contextlib
import hashlib
import importlib
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_dataset, create_transform

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / 'train_scripts' / 'prepare_data.py'
sys.path.append(str(SCRIPT.parent))
prepare_data = importlib.import_module('prepare_data')


def prepare(*args):
    """Runs the script in this process, which saves the imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = prepare_data.main([*map(str, args)])
        except SystemExit as e:
            code = e.code
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for label in ('a', 'b'):
        (tmp_path / 'train' / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'train' / label / f'{i}.png')
    return tmp_path


def test_random_crop_of_padded_images_is_exact(images):
    """timm's training transform of the recipe crops all windows of a padded image, without resampling."""
    done = prepare('pad', images / 'train', images / 'padded', '--workers', 1)
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((ROOT / 'train_scripts' / 'recipes' / 'tmm_small_image.yaml').read_text())
    transform = create_transform(
        tuple(recipe['input_size']), is_training=True, scale=recipe['scale'], ratio=recipe['ratio'],
        hflip=recipe['hflip'], color_jitter=recipe['color_jitter'], interpolation=recipe['train_interpolation'],
        mean=(0, 0, 0), std=(1, 1, 1))
    original = np.asarray(Image.open(images / 'train' / 'a' / '0.png'))
    border = np.pad(original, ((4, 4), (4, 4), (0, 0)))
    windows = {
        np.ascontiguousarray(border[y:y + 32, x:x + 32][:, ::flip]).tobytes()
        for y in range(9) for x in range(9) for flip in (1, -1)}
    padded = Image.open(images / 'padded' / 'a' / '0.png')
    torch.manual_seed(0)
    drawn = set()
    for _ in range(4000):
        pixels = (transform(padded) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        drawn.add(pixels.tobytes())
    assert drawn <= windows, 'a crop is not a window of the padded image'
    assert len(drawn) == len(windows) == 162


def test_downsampling_averages_pixels(images):
    (images / 'train' / 'a' / '0.png').unlink()
    Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(images / 'train' / 'a' / '0.png')
    assert prepare('downsample', images / 'train', images / 'small', '--size', 4).returncode == 0
    large = np.asarray(Image.open(images / 'train' / 'a' / '0.png')).astype(float)
    small = np.asarray(Image.open(images / 'small' / 'a' / '0.png')).astype(float)
    means = large.reshape(4, 2, 4, 3, 3).mean(axis=(1, 3))
    assert small.shape == (4, 4, 3)
    assert np.abs(small - means).max() < 1, 'rounded once in each direction'


@pytest.mark.parametrize('verb', ['pad', 'downsample'])
def test_broken_images_stop_or_are_skipped(images, verb):
    (images / 'train' / 'a' / 'broken.png').write_bytes(b'\x89PNG, not')
    (images / 'train' / 'b' / 'short.png').write_bytes((images / 'train' / 'b' / '0.png').read_bytes()[:900])
    (images / 'train' / 'a' / 'notes.txt').write_text('not an image')
    stopped = prepare(verb, images / 'train', images / 'out', '--workers', 1)
    assert stopped.returncode == 1
    assert 'broken.png cannot be read as an image' in stopped.stderr
    assert '--broken skip' in stopped.stderr
    skipped = prepare(verb, images / 'train', images / 'out', '--workers', 2, '--broken', 'skip')
    assert skipped.returncode == 0
    assert '2 images skipped' in skipped.stderr
    assert 'broken.png' in skipped.stderr
    assert 'short.png' in skipped.stderr
    assert len(list((images / 'out').rglob('*.*'))) == 6, 'only complete images'
    assert len(create_dataset('', root=str(images / 'out'))) == 6


def test_links_to_class_folders(images):
    """timm's reader follows such links too."""
    (images / 'some').mkdir()
    (images / 'some' / 'a').symlink_to(images / 'train' / 'a')
    assert prepare('pad', images / 'some', images / 'padded').returncode == 0
    assert sorted(path.name for path in (images / 'padded' / 'a').iterdir()) == ['0.png', '1.png', '2.png']


def test_interrupted_preparation_continues(images):
    assert prepare('pad', images / 'train', images / 'out').returncode == 0
    (images / 'out' / 'b' / '1.png').unlink()
    kept = (images / 'out' / 'a' / '1.png').stat().st_mtime_ns
    assert prepare('pad', images / 'train', images / 'out').returncode == 0
    assert (images / 'out' / 'b' / '1.png').exists()
    assert (images / 'out' / 'a' / '1.png').stat().st_mtime_ns == kept


def test_full_disk_leaves_no_partial_files(images):
    """A limit on the file size simulates the full disk."""
    code = (
        'import resource, runpy, signal, sys, timm\n'  # some releases of torch write a file when they are imported
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n'
        'sys.argv = sys.argv[1:]\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")\n')
    done = subprocess.run(
        [sys.executable, '-c', code, SCRIPT, 'pad', images / 'train', images / 'out', '--workers', '1', '--broken',
         'skip'],
        capture_output=True, text=True)
    assert done.returncode == 1
    assert '.png cannot be written: File too large.' in done.stderr
    assert not list((images / 'out').rglob('*.*'))


def test_two_images_with_the_same_name(images):
    Image.new('RGB', (32, 32)).save(images / 'train' / 'a' / '0.bmp')
    done = prepare('pad', images / 'train', images / 'out')
    assert done.returncode == 1
    assert '0.bmp' in done.stderr
    assert '0.png would both become' in done.stderr


@pytest.mark.parametrize(('args', 'code', 'message'), [
    (['pad', 'nowhere', 'out'], 2, 'nowhere is not a folder'),
    (['pad', '.', 'out', '--padding', '0'], 2, 'argument --padding: must be at least 1, got 0'),
    (['downsample', '.', 'out', '--workers', '0'], 2, 'argument --workers: must be at least 1, got 0'),
    (['pad', '.', 'out'], 1, 'No images found in .'),
    (['classes', '.', 'out'], 1, 'No class folders with images found in .'),
    (['cifar100', '.', 'out'], 1, 'cifar-100-python.tar.gz not found'),
])
def test_invalid_arguments(args, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = prepare(*args)
    assert done.returncode == code
    assert message in done.stderr
    assert not (tmp_path / 'out').exists()


def test_class_names_are_in_timms_order(images):
    for name in ('class10', 'class9'):
        (images / 'train' / name).mkdir()
        Image.new('RGB', (8, 8)).save(images / 'train' / name / 'x.png')
    assert prepare('classes', images / 'train', images / 'names.txt').stdout == '4 classes\n'
    names = (images / 'names.txt').read_text().splitlines()
    root = str(images / 'train')
    by_folder = create_dataset('', root=root).reader.class_to_idx
    by_file = create_dataset('', root=root, class_map=str(images / 'names.txt')).reader.class_to_idx
    assert names == ['a', 'b', 'class9', 'class10'], 'natural order'
    assert by_folder == by_file == {name: i for i, name in enumerate(names)}


def test_cifar100_from_a_local_archive(tmp_path, monkeypatch, capsys):
    """A small archive with the original layout, whose digests replace torchvision's."""
    import runpy

    from torchvision.datasets import CIFAR100

    script = runpy.run_path(str(SCRIPT))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    files = {
        'train': {'data': pixels.reshape(2, -1), 'fine_labels': [1, 0]},
        'test': {'data': pixels[:1].reshape(1, -1), 'fine_labels': [1]},
        'meta': {'fine_label_names': ['apple', 'whale']},
    }
    with tarfile.open(tmp_path / CIFAR100.filename, 'w:gz') as archive:
        digests = {}
        for name, content in files.items():
            data = pickle.dumps(content)
            digests[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f'cifar-100-python/{name}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(CIFAR100, 'tgz_md5', hashlib.md5((tmp_path / CIFAR100.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, 'train_list', [['train', digests['train']]])
    monkeypatch.setattr(CIFAR100, 'test_list', [['test', digests['test']]])
    monkeypatch.setattr(CIFAR100, 'meta', dict(CIFAR100.meta, md5=digests['meta']))
    monkeypatch.setattr(CIFAR100, 'url', 'http://127.0.0.1:9/none')

    assert script['main'](['cifar100', str(tmp_path), str(tmp_path / 'out')]) == 0
    written = {str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*.png')}
    assert written == {'train/whale/00000.png', 'train/apple/00001.png', 'validation/whale/00000.png'}
    apple = np.asarray(Image.open(tmp_path / 'out' / 'train' / 'apple' / '00001.png'))
    assert (apple == pixels[1].transpose(1, 2, 0)).all()

    (tmp_path / CIFAR100.filename).write_bytes(b'an error page')
    for file in (tmp_path / 'cifar-100-python').iterdir():
        file.unlink()
    assert script['main'](['cifar100', str(tmp_path), str(tmp_path / 'again')]) == 1
    assert 'CIFAR-100 cannot be read from' in capsys.readouterr().err
    assert not (tmp_path / 'again').exists()
