"""The detection dataset that train_scripts/coins.py creates from the photograph of coins in scikit-image."""
import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_spa.detection.data import CocoDataset, find_dataset
from timm_spa.predict import sample_image

SCRIPTS = str(Path(__file__).parent.parent / 'train_scripts')


@pytest.fixture
def coins(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module('coins')


def test_every_coin_is_found_once(coins):
    """The photograph has four rows of six coins."""
    labels, boxes = coins.find_coins(np.asarray(Image.open(sample_image('coins'))).astype(float))
    middles = sorted(((rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2) for rows, columns in boxes)
    assert len(middles) == labels.max() == 24
    for row in range(4):
        heights, places = zip(*middles[6 * row:6 * row + 6], strict=True)
        assert max(heights) - min(heights) < 40
        assert np.diff(sorted(places)).min() > 30
    assert all(30 < side.stop - side.start < 70 for box in boxes for side in box)


def test_dataset(coins, tmp_path, capsys):
    """Training images show coins of the left half only; the validation image is the right half, unchanged."""
    assert coins.main([str(tmp_path / 'a'), '--images', '4']) == 0
    assert 'val: 1 images, 12 coins' in capsys.readouterr().out
    photograph = np.asarray(Image.open(sample_image('coins')))
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'a' / 'val' / 'right.png')), photograph[:, 192:])
    for split, count in (('train', 4), ('val', 1)):
        dataset = CocoDataset(*find_dataset(tmp_path / 'a', split))
        assert len(dataset) == count
        for image, target in dataset:
            assert tuple(image.shape) == (3, 303, 192)
            inside, outside = [], image[0].clone()
            for x0, y0, x1, y1 in target['boxes'].int().tolist():
                assert 0 <= x0 < x1 <= 192
                assert 0 <= y0 < y1 <= 303
                inside.append(image[0, y0:y1, x0:x1].mean())
                outside[y0:y1, x0:x1] = np.nan
            assert len(inside) == 12 if split == 'val' else 2 <= len(inside) <= 12
            assert min(inside) > outside.nanmean() + 0.1, 'coins are brighter than the background'
    assert coins.main([str(tmp_path / 'a')]) == 1
    assert 'exists already. Name a new folder' in capsys.readouterr().err
    assert coins.main([str(tmp_path / 'b'), '--images', '4']) == 0
    for path in (tmp_path / 'a').rglob('*.*'):
        assert path.read_bytes() == (tmp_path / 'b' / path.relative_to(tmp_path / 'a')).read_bytes(), 'the same bytes'


def test_only_coins_of_the_left_half_are_used(coins, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(coins, 'compose', lambda *args: given.append(args[:2]) or (args[0], []))
    coins.create(tmp_path / 'data', 1, 0)
    (background, cut), = given
    photograph = np.asarray(Image.open(sample_image('coins'))).astype(float)
    assert len(cut) == 12
    assert background.shape == (303, 192)
    for pixels, _ in cut:
        height, width = pixels.shape
        places = [
            x for y, x in np.argwhere(photograph == pixels[0, 0])
            if np.array_equal(photograph[y:y + height, x:x + width], pixels)]
        assert len(places) == 1
        assert places[0] + width / 2 < 192
