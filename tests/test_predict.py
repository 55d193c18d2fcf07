"""Predictions for grey, rotated and broken images, for folders, and for files with the same name."""
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
from timm_spa.predict import ImageError, ModelError, class_names, labelled_batches, load_model, predict


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('spa_mobilenetv2_cifar', num_classes=5).eval()


@pytest.fixture
def images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, size in (('a/one.png', (40, 60)), ('b/one.png', (60, 40)), ('b/deep/two.jpg', (50, 50))):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(path)
    (tmp_path / 'b' / 'notes.txt').write_text('not an image')
    return tmp_path


def probabilities(predictions):
    return [[round(c['probability'], 5) for c in p.classes] for p in predictions]


def test_a_folder(model, images):
    predictions = list(predict(model, [images]))
    assert [p.path for p in predictions] == [str(images / n) for n in ('a/one.png', 'b/deep/two.jpg', 'b/one.png')]
    assert not any(p.error for p in predictions)
    (images / 'a' / 'up').symlink_to('..')
    assert len(list(predict(model, [images]))) == 3, 'each image is read once, also if several links lead to it'
    empty = images / 'empty'
    empty.mkdir()
    assert 'it is a folder without images' in next(predict(model, [empty])).error


def test_a_rotated_image_is_read_upright(model, images):
    """Phones store the pixels unrotated, and the orientation as EXIF data."""
    upright = Image.open(images / 'a' / 'one.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(images / 'phone.png', exif=exif)
    first, second = predict(model, [images / 'a' / 'one.png', images / 'phone.png'])
    assert probabilities([first]) == probabilities([second])


def test_a_model_for_grey_images(images):
    model = timm.create_model('spa_mobilenetv2_cifar', in_chans=1, num_classes=5).eval()
    assert len(next(predict(model, [images / 'a' / 'one.png'])).classes) == 5


@pytest.mark.parametrize(('name', 'kwargs', 'folders', 'expected'), [
    ('spa_mobilenetv2_cifar', dict(in_chans=1, num_classes=2), ['x', 'y'], [0, 1]),
    # not the 200 class names of the shipped weights
    ('spa_mobilenetv2_cifar', dict(num_classes=3), ['dog', 'goldfish', 'zebra'], [0, 1, 2]),
    ('mobilenetv2_cifar', dict(num_classes=1000), ['n01440764', 'n02979186', 'n03888257'], [0, 482, 701]),
    ('spa_mobilenetv2_cifar', dict(), ['n02808440', 'n01443537'], [0, 69]),
], ids=['grey', 'own names', 'three of ImageNet', "two of the model's classes"])
def test_folders_match_the_classes_of_the_model(name, kwargs, folders, expected, tmp_path):
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


def test_a_missing_split(tmp_path):
    model = timm.create_model('mobilenetv2_cifar', num_classes=2)
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 40)).save(tmp_path / split / name / 'black.png')
    with pytest.raises(ImageError, match=f"{tmp_path} has no folder 'test': .* Set --split to one of train, val"):
        labelled_batches(model, tmp_path, 'test', 2)
    for split in ('val', 'validation', 'train'):  # timm accepts synonyms
        assert labelled_batches(model, tmp_path, split, 2)[1] == 2
    assert labelled_batches(model, tmp_path / 'val', 'test', 2)[1] == 2


def test_a_class_named_like_a_split(tmp_path):
    for name in ('bus', 'train'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / name / 'black.png')
    assert labelled_batches(timm.create_model('mobilenetv2_cifar', num_classes=2), tmp_path, 'test', 2)[1] == 2


def test_a_checkpoint_without_class_names(tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / 'images' / name / 'black.png')
    torch.save(timm.create_model('mobilenetv2_cifar', num_classes=2).state_dict(), tmp_path / 'w.pth')
    model = load_model('mobilenetv2_cifar', tmp_path / 'w.pth', 2)
    assert class_names(model) == [dict(label=None, name='class 0'), dict(label=None, name='class 1')]
    assert [target.tolist() for _, target in labelled_batches(model, tmp_path / 'images', 'test', 2)[0]] == [[0, 1]]
    (tmp_path / 'classes.txt').write_text('cow\npig\n')
    model = load_model('mobilenetv2_cifar', tmp_path / 'w.pth', 2)
    with pytest.raises(ImageError, match='other classes than the 2 of the model'):
        labelled_batches(model, tmp_path / 'images', 'test', 2)


def test_a_detector_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(detector='retinanet', backbone='resnet18', num_classes=3)))
    with pytest.raises(ModelError, match='does not name an architecture of timm. Use `timm-spa detect` for detectors'):
        load_model(f'local-dir:{tmp_path}')


def test_folders_with_other_classes(tmp_path):
    for folder in ('n01443537', 'goldfish'):
        (tmp_path / folder).mkdir()
        Image.new('RGB', (40, 40)).save(tmp_path / folder / 'black.png')
    match = 'other classes than the 200 of the model: 2 class folders, unknown are goldfish. Name'
    with pytest.raises(ImageError, match=match):
        labelled_batches(timm.create_model('spa_mobilenetv2_cifar'), tmp_path, 'test', 2)
    match = 'other classes than the 3 of the model: 2 class folders, unknown are goldfish, n01443537'
    with pytest.raises(ImageError, match=match):
        labelled_batches(timm.create_model('spa_mobilenetv2_cifar', num_classes=3), tmp_path, 'test', 2)


def test_any_error_of_a_decoder_concerns_one_image(model, images, monkeypatch):
    def open_image(path, opened=Image.open):
        if 'deep' in str(path):
            raise RuntimeError('the decoder broke')
        return opened(path)

    monkeypatch.setattr(Image, 'open', open_image)
    errors = [p.error for p in predict(model, [images])]
    assert errors == [None, 'RuntimeError: the decoder broke', None]


def test_images_with_the_same_name(images, tmp_path, capsys):
    torch.save(timm.create_model('spa_mobilenetv2_cifar', num_classes=5).state_dict(), tmp_path / 'w.pth')
    paths = [str(images / 'a' / 'one.png'), str(images / 'b' / 'one.png'), str(images / 'b' / 'deep' / 'two.jpg')]
    arguments = [*paths, '--checkpoint', str(tmp_path / 'w.pth'), '--num-classes', '5', '--top-k', '1']
    arguments += ['--model', 'spa_mobilenetv2_cifar']
    assert timm_spa_cli.main(['predict', *arguments]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [*paths[:2], 'two.jpg']
    assert timm_spa_cli.main(['predict', *arguments, '--json']) == 0
    assert [entry['path'] for entry in json.loads(capsys.readouterr().out)] == paths


@pytest.mark.parametrize(('value', 'message'), [(float('nan'), 'not finite'), (-1., 'negative variances')])
def test_invalid_weights(value, message, tmp_path):
    model = timm.create_model('spa_mobilenetv2_cifar')
    torch.nn.init.constant_(model.bn1.running_var, value)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match=f'{message}: bn1.running_var'):
        load_model('spa_mobilenetv2_cifar', tmp_path / 'w.pth', 200)


def test_images_outside_of_the_class_folders(tmp_path):
    (tmp_path / 'cat').mkdir()
    for name in ('cat/black.png', 'black.png'):
        Image.new('RGB', (40, 40)).save(tmp_path / name)
    with pytest.raises(ImageError, match='has images outside of its class folders'):
        labelled_batches(timm.create_model('mobilenetv2_cifar', num_classes=2), tmp_path, 'test', 2)


def test_files_that_are_not_images(model, tmp_path):
    """An animation is read as its first frame. Other files raise an error each, and a pipe does not block."""
    frames = [Image.new('RGB', (40, 40), colour) for colour in ('red', 'blue')]
    frames[0].save(tmp_path / 'b.gif', save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / 'a.gif')
    Image.effect_noise((64, 64), 90).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:900])
    (tmp_path / 'empty.jpg').write_bytes(b'')
    os.mkfifo(tmp_path / 'pipe.jpg')
    predictions = {Path(p.path).name: p for p in predict(model, [tmp_path, tmp_path / 'missing.png'])}
    assert predictions['a.gif'].classes == predictions['b.gif'].classes != []
    for name, cause in (
            ('cut.jpg', 'truncated'), ('empty.jpg', 'cannot identify'), ('pipe.jpg', 'a pipe or a device'),
            ('missing.png', 'No such file')):
        assert cause in predictions[name].error


def test_invalid_arguments(model, images):
    for count in (0, -1):
        with pytest.raises(UsageError, match='top_k must be at least 1'):
            next(predict(model, [images], count))
    assert len(next(predict(model, [images], 10 ** 12)).classes) == 5
    with pytest.raises(ModelError, match='cannot classify images: it was created with num_classes=0'):
        next(predict(timm.create_model('mobilenetv2_cifar', num_classes=0).eval(), [images]))
    with pytest.raises(ModelError, match='FeatureListNet is not a classifier of timm'):
        next(predict(timm.create_model('mobilenetv2_cifar', features_only=True), [images]))
    with pytest.raises(UsageError, match='batch size must be at least 1'):
        labelled_batches(model, images, 'test', 0)


def test_folders_that_share_classes_are_splits(tmp_path):
    """The rule for training also applies here: folders with the same class folders are splits, whatever their names."""
    model = timm.create_model('mobilenetv2_cifar', num_classes=2)
    for split in ('first', 'second'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 40)).save(tmp_path / split / name / 'black.png')
    with pytest.raises(ImageError, match="has no folder 'test': .* Set --split to one of first, second"):
        labelled_batches(model, tmp_path, 'test', 2)
    assert labelled_batches(model, tmp_path, 'second', 2)[1] == 2
