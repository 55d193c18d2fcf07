"""Pictures as users have them: grey, rotated, broken, in folders, of one name."""
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_spa  # noqa: F401
import timm_spa_cli
from timm_spa._errors import UsageError
from timm_spa.hub import CheckpointError
from timm_spa.predict import ModelError, PictureError, class_names, labelled_batches, load_model, predict


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('spa_mobilenetv2_cifar', num_classes=5).eval()


@pytest.fixture
def pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, size in (('a/one.png', (40, 60)), ('b/one.png', (60, 40)), ('b/deep/two.jpg', (50, 50))):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(path)
    (tmp_path / 'b' / 'notes.txt').write_text('no picture')
    return tmp_path


def probabilities(predictions):
    return [[round(c['probability'], 5) for c in p.classes] for p in predictions]


def test_a_folder_is_its_pictures(model, pictures):
    found = list(predict(model, [pictures]))
    assert [p.path for p in found] == [str(pictures / n) for n in ('a/one.png', 'b/deep/two.jpg', 'b/one.png')]
    assert not any(p.error for p in found)
    (pictures / 'a' / 'up').symlink_to('..')
    assert len(list(predict(model, [pictures]))) == 3, 'a picture is there once, however many links lead to it'
    empty = pictures / 'empty'
    empty.mkdir()
    assert 'no image in it' in next(predict(model, [empty])).error


def test_a_rotated_picture_is_read_upright(model, pictures):
    """As a phone stores it: pixels on their side, and a note which side is up."""
    upright = Image.open(pictures / 'a' / 'one.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(pictures / 'phone.png', exif=exif)
    first, second = predict(model, [pictures / 'a' / 'one.png', pictures / 'phone.png'])
    assert probabilities([first]) == probabilities([second])


def test_a_model_of_grey_pictures(pictures):
    model = timm.create_model('spa_mobilenetv2_cifar', in_chans=1, num_classes=5).eval()
    assert len(next(predict(model, [pictures / 'a' / 'one.png'])).classes) == 5


@pytest.mark.parametrize(('name', 'kwargs', 'folders', 'expected'), [
    ('spa_mobilenetv2_cifar', dict(in_chans=1, num_classes=2), ['x', 'y'], [0, 1]),
    # not the 200 names of the shipped weights' classes
    ('spa_mobilenetv2_cifar', dict(num_classes=3), ['dog', 'goldfish', 'zebra'], [0, 1, 2]),
    ('mobilenetv2_cifar', dict(num_classes=1000), ['n01440764', 'n02979186', 'n03888257'], [0, 482, 701]),
    ('spa_mobilenetv2_cifar', dict(), ['n02808440', 'n01443537'], [0, 69]),
], ids=['grey', "one's own", 'three of ImageNet', 'two of its own'])
def test_folders_are_the_models_classes(name, kwargs, folders, expected, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new('RGB', (40, 40), 'red').save(tmp_path / folder / 'red.png')
    (tmp_path / 'empty').mkdir()
    model = timm.create_model(name, **kwargs).eval()
    loader, count = labelled_batches(model, tmp_path, 'test', 2)
    batches = list(loader)
    assert count == len(folders)
    assert torch.cat([target for _, target in batches]).tolist() == expected
    assert all(len(model(images)) == len(target) for images, target in batches)


def test_a_split_that_is_not_there(tmp_path):
    model = timm.create_model('mobilenetv2_cifar', num_classes=2)
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 40)).save(tmp_path / split / name / 'black.png')
    with pytest.raises(PictureError, match=f"{tmp_path} has no folder 'test', but train, val: choose one by --split"):
        labelled_batches(model, tmp_path, 'test', 2)
    for split in ('val', 'validation', 'train'):  # timm knows synonyms
        assert labelled_batches(model, tmp_path, split, 2)[1] == 2
    assert labelled_batches(model, tmp_path / 'val', 'test', 2)[1] == 2


def test_a_class_with_the_name_of_a_split(tmp_path):
    for name in ('bus', 'train'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / name / 'black.png')
    assert labelled_batches(timm.create_model('mobilenetv2_cifar', num_classes=2), tmp_path, 'test', 2)[1] == 2


def test_a_checkpoint_whose_classes_have_no_names(tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / 'images' / name / 'black.png')
    torch.save(timm.create_model('mobilenetv2_cifar', num_classes=2).state_dict(), tmp_path / 'w.pth')
    model = load_model('mobilenetv2_cifar', tmp_path / 'w.pth', 2)
    assert class_names(model) == [dict(label=None, name='class 0'), dict(label=None, name='class 1')]
    assert [target.tolist() for _, target in labelled_batches(model, tmp_path / 'images', 'test', 2)[0]] == [[0, 1]]
    (tmp_path / 'classes.txt').write_text('cow\npig\n')
    model = load_model('mobilenetv2_cifar', tmp_path / 'w.pth', 2)
    with pytest.raises(PictureError, match='other classes than the 2 of the model'):
        labelled_batches(model, tmp_path / 'images', 'test', 2)


def test_a_detector_is_no_classifier(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(detector='retinanet', backbone='resnet18', num_classes=3)))
    with pytest.raises(ModelError, match='names no architecture of timm. Detectors are for `timm-spa detect`'):
        load_model(f'local-dir:{tmp_path}')


def test_folders_of_other_classes(tmp_path):
    for folder in ('n01443537', 'goldfish'):
        (tmp_path / folder).mkdir()
        Image.new('RGB', (40, 40)).save(tmp_path / folder / 'black.png')
    with pytest.raises(PictureError, match='other classes than the 200 of the model: 2 folders, goldfish among them'):
        labelled_batches(timm.create_model('spa_mobilenetv2_cifar'), tmp_path, 'test', 2)
    with pytest.raises(PictureError, match='other classes than the 3 of the model: 2 folders, goldfish, n01443537'):
        labelled_batches(timm.create_model('spa_mobilenetv2_cifar', num_classes=3), tmp_path, 'test', 2)


def test_whatever_a_decoder_raises_is_an_error_of_one_picture(model, pictures, monkeypatch):
    def open_picture(path, opened=Image.open):
        if 'deep' in str(path):
            raise RuntimeError('the decoder broke')
        return opened(path)

    monkeypatch.setattr(Image, 'open', open_picture)
    errors = [p.error for p in predict(model, [pictures])]
    assert errors == [None, 'RuntimeError: the decoder broke', None]


def test_pictures_of_one_name_are_told_apart(pictures, tmp_path, capsys):
    torch.save(timm.create_model('spa_mobilenetv2_cifar', num_classes=5).state_dict(), tmp_path / 'w.pth')
    paths = [str(pictures / 'a' / 'one.png'), str(pictures / 'b' / 'one.png'), str(pictures / 'b' / 'deep' / 'two.jpg')]
    arguments = [*paths, '--checkpoint', str(tmp_path / 'w.pth'), '--num-classes', '5', '--top-k', '1']
    arguments += ['--model', 'spa_mobilenetv2_cifar']
    assert timm_spa_cli.main(['predict', *arguments]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [*paths[:2], 'two.jpg']
    assert timm_spa_cli.main(['predict', *arguments, '--json']) == 0
    assert [entry['path'] for entry in json.loads(capsys.readouterr().out)] == paths


@pytest.mark.parametrize(('value', 'message'), [(float('nan'), 'not finite'), (-1., 'variances below zero')])
def test_weights_that_are_none(value, message, tmp_path):
    model = timm.create_model('spa_mobilenetv2_cifar')
    torch.nn.init.constant_(model.bn1.running_var, value)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match=f'{message}: bn1.running_var'):
        load_model('spa_mobilenetv2_cifar', tmp_path / 'w.pth', 200)


def test_images_outside_of_the_folders_of_classes(tmp_path):
    (tmp_path / 'cat').mkdir()
    for name in ('cat/black.png', 'black.png'):
        Image.new('RGB', (40, 40)).save(tmp_path / name)
    with pytest.raises(PictureError, match='has images outside of its folders of classes'):
        labelled_batches(timm.create_model('mobilenetv2_cifar', num_classes=2), tmp_path, 'test', 2)


def test_files_that_are_no_images(model, tmp_path):
    """An animation is its first frame; everything else is an error of its own, and a pipe does not block."""
    frames = [Image.new('RGB', (40, 40), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'b.gif', save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / 'a.gif')
    Image.effect_noise((64, 64), 90).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:900])
    (tmp_path / 'empty.jpg').write_bytes(b'')
    os.mkfifo(tmp_path / 'pipe.jpg')
    found = {Path(p.path).name: p for p in predict(model, [tmp_path, tmp_path / 'missing.png'])}
    assert found['a.gif'].classes == found['b.gif'].classes != []
    for name, cause in (
            ('cut.jpg', 'truncated'), ('empty.jpg', 'cannot identify'), ('pipe.jpg', 'a pipe or a device'),
            ('missing.png', 'No such file')):
        assert cause in found[name].error


def test_what_cannot_be_predicted(model, pictures):
    for count in (0, -1):
        with pytest.raises(UsageError, match='top_k must be at least 1'):
            next(predict(model, [pictures], count))
    assert len(next(predict(model, [pictures], 10 ** 12)).classes) == 5
    with pytest.raises(ModelError, match='has no classes'):
        next(predict(timm.create_model('mobilenetv2_cifar', num_classes=0).eval(), [pictures]))
    with pytest.raises(ModelError, match='FeatureListNet is not a classifier of timm'):
        next(predict(timm.create_model('mobilenetv2_cifar', features_only=True), [pictures]))
    with pytest.raises(UsageError, match='batch size must be at least 1'):
        labelled_batches(model, pictures, 'test', 0)
