"""Boxes on the user's images, and curves of a detector's training."""
import json

import pytest
import torch
from PIL import Image
from test_detect_cli import detect, small

import timm_spa_cli
from timm_spa.detection import save_detector
from timm_spa_cli._table import distinct


@pytest.mark.parametrize(('names', 'expected'), [
    ('a b', 'a b'), ('x x', 'x-1 x-2'), ('x x x-1', 'x-2 x-3 x-1'), ('x-2 x x x-2', 'x-2-1 x-3 x-4 x-2-4')])
def test_distinct_names(names, expected):
    assert distinct(names.split()) == expected.split()


def test_predict_never_replaces_its_input(tmp_path, monkeypatch, capsys):
    """Results are written next to the images. Two images have the same name, and one is too narrow."""
    monkeypatch.chdir(tmp_path)
    model = small()
    torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)  # all scores are 1/2
    save_detector(model, tmp_path / 'a', [dict(id=i, name=name) for i, name in enumerate('xyz')])
    (tmp_path / 'b').mkdir()
    for name, size in (('street.png', (64, 64)), ('b/street.png', (64, 64)), ('narrow.png', (3, 900))):
        Image.new('RGB', size, (90, 120, 60)).save(name)
    before = (tmp_path / 'street.png').read_bytes()
    images = ['street.png', 'narrow.png', 'b/street.png']
    command = ['predict', *images, '--checkpoint', 'a', '--device', 'cpu', '--score', 0.9]
    assert detect(*command, '--out', '.') == 1
    assert (tmp_path / 'street.png').read_bytes() == before
    assert sorted(p.name for p in tmp_path.glob('*-boxes.png')) == ['street-1-boxes.png', 'street-3-boxes.png']
    assert {r['image_id'] for r in json.loads((tmp_path / 'a.json').read_text())} == {'street.png', 'b/street.png'}
    assert capsys.readouterr().err == (
        'timm-spa: narrow.png: 3 x 900 pixels are too narrow for this detector, which resizes the longer side to 64 '
        'pixels and the shorter side to 0. Crop the image, or train with a larger max_size.\n')
    (tmp_path / 'street-1-boxes.png').write_bytes(before)
    assert detect('predict', *images, 'street-1-boxes.png', *command[4:], '--out', '.') == 1
    assert 'street-1-boxes.png would be replaced by an image with boxes' in capsys.readouterr().err
    assert (tmp_path / 'street-1-boxes.png').read_bytes() == before


def test_predict_folders(tmp_path, monkeypatch, capsys):
    """Reads subfolders in order of names, and skips the results of an earlier call."""
    monkeypatch.chdir(tmp_path)
    save_detector(small(), tmp_path / 'a', [dict(id=i, name=name) for i, name in enumerate('xyz')])
    for name in ('images/b.png', 'images/sub/a.jpg', 'images/sub/b.png', 'single.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 64)).save(name)
    (tmp_path / 'images' / 'notes.txt').write_text('x')
    (tmp_path / 'empty').mkdir()
    command = ['--checkpoint', 'a', '--device', 'cpu', '--out', 'images']
    for _ in range(2):
        assert detect('predict', 'images', 'single.png', *command) == 0
        *lines, written = capsys.readouterr().out.splitlines()
        assert [line.partition(':')[0] for line in lines] == [
            'images/b.png', 'images/sub/a.jpg', 'images/sub/b.png', 'single.png']
        assert written == 'Wrote images: b-1-boxes.png, a-boxes.png, b-3-boxes.png, single-boxes.png, a.json.'
    assert sorted(p.name for p in (tmp_path / 'images').glob('*-boxes.png')) == [
        'a-boxes.png', 'b-1-boxes.png', 'b-3-boxes.png', 'single-boxes.png']
    assert detect('predict', 'empty', *command) == 1
    assert capsys.readouterr().err == (
        'timm-spa: empty cannot be read as an image: it is a folder. Name an image, or a folder that contains '
        'images.\n')
    (tmp_path / 'empty' / 'x-boxes.png').write_bytes((tmp_path / 'single.png').read_bytes())
    assert detect('predict', 'empty', '--checkpoint', 'a', '--out', 'empty') == 1
    assert 'empty contains only images that this command wrote' in capsys.readouterr().err


def test_curves_of_a_detector_and_a_classifier(tmp_path, capsys):
    for name, header in (('a', 'epoch,train_loss,eval_map,eval_ap50'), ('b', 'epoch,train_loss,eval_loss,eval_top1')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'summary.csv').write_text(f'{header}\n0,1,2,3\n')
    assert timm_spa_cli.main(['explain', 'curves', str(tmp_path)]) == 1
    assert 'one is a classifier, the other a detector. Draw them separately.' in capsys.readouterr().err
