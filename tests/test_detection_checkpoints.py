"""Checkpoints of detectors: what they hold, and what is refused."""
import json
import math

import pytest
import torch
from test_detection import BUILDERS, SMALL, trainable_millions

from timm_spa.detection import DetectionError, load_detector, retinanet, save_detector
from timm_spa.detection.backbone import create_body
from timm_spa.hub import CheckpointError


@pytest.mark.parametrize(('detector', 'backbone', 'kwargs'), [
    ('retinanet', 'gated', dict(backbone_kwargs=dict(base='resnet18', pyramid_sizes=(1, 2)), score_thresh=0.001)),
    ('cascade_rcnn', 'spa_resnet18', dict(trainable_layers=5, detections_per_img=7))])
def test_a_checkpoint_rebuilds_the_detector(tmp_path, detector, backbone, kwargs):
    torch.manual_seed(0)
    model = BUILDERS[detector](backbone, **SMALL, **kwargs).eval()
    categories = [dict(id=i * 10, name=f'thing {i}', supercategory='x') for i in range(3)]
    save_detector(model, tmp_path / 'a', categories)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a']
    again = load_detector(tmp_path / 'a')
    assert not again.training
    assert again.categories == [dict(id=i * 10, name=f'thing {i}') for i in range(3)]
    assert trainable_millions(again) == trainable_millions(model)
    images = [torch.rand(3, 60, 60)]
    with torch.no_grad():
        expected, detection = model(images)[0], again(images)[0]
    assert len(expected['boxes']) > 0
    assert all(torch.equal(expected[key], detection[key]) for key in expected)
    save_detector(again, tmp_path / 'a', again.categories)


def test_a_detector_that_cannot_be_rebuilt_is_not_saved(tmp_path):
    model = retinanet('resnet18', **SMALL)
    named = [dict(id=i, name=str(i)) for i in range(3)]
    for categories, message in (
            ([named[0], named[0], named[1]], 'an id and a unique name'),
            ([dict(c, name=3) for c in named], 'an id and a unique name'),
            ([1, 2, 3], 'a list of classes'),
            ([dict(c, id=torch.zeros(1)) for c in named], 'must be texts or numbers')):
        with pytest.raises(DetectionError, match=message):
            save_detector(model, tmp_path / 'a', categories)
    model.detector_config['anchor_generator'] = model.anchor_generator
    with pytest.raises(DetectionError, match='unsupported arguments in a checkpoint: anchor_generator'):
        save_detector(model, tmp_path / 'a', named)
    assert not list(tmp_path.iterdir())


def test_invalid_checkpoints(tmp_path):
    with pytest.raises(DetectionError, match='not a checkpoint of a detector, i.e. a folder with model.safetensors'):
        load_detector(tmp_path)
    for text in ('[]', '{', '{"detector": "yolo"}', '{"categories": [], "architecture": "resnet18"}'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(DetectionError, match='config.json does not describe a detector'):
            load_detector(tmp_path)
    (tmp_path / 'config.json').unlink()  # save_detector would refuse to replace it
    model = retinanet('resnet18', **SMALL)
    with pytest.raises(DetectionError, match='1 categories for 3 classes'):
        save_detector(model, tmp_path, [dict(id=1, name='a')])
    save_detector(model, tmp_path, [dict(id=i, name=str(i)) for i in range(3)])
    config = json.loads((tmp_path / 'config.json').read_text())
    for changes in (
            dict(pretrained_backbone='/etc/passwd'), dict(backbone_kwargs=dict(checkpoint_path='/etc/passwd')),
            dict(backbone_kwargs=dict(pretrained_cfg_overlay=dict(url='http://localhost')))):
        (tmp_path / 'config.json').write_text(json.dumps(dict(config, **changes)))
        with pytest.raises(DetectionError, match='is not allowed in a checkpoint'):
            load_detector(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:-100])
    with pytest.raises(CheckpointError, match='truncated safetensors file, 100 bytes are missing'):
        load_detector(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='model.safetensors is missing'):
        load_detector(tmp_path)


# JSON values of every type; FIELDS lists the values that each field accepts
VALUES = {
    'text': 'abc', 'empty': '', 'list': [], 'numbers': [1], 'texts': ['a'], 'null': None, 'zero': 0, 'one': 1, 'two': 2,
    'negative': -1, 'fraction': 0.5, 'nan': math.nan, 'inf': math.inf, 'true': True, 'false': False, 'dict': {},
    'nested': {'a': {'b': [1]}}, 'huge': 10 ** 400, 'zeros': [0, 0, 0], 'nulls': [None] * 3, 'colour': [0.5, 0.5, 0.5]}
FRACTIONS = {'zero', 'one', 'fraction'}
FIELDS = {
    'detector': set(), 'backbone': set(), 'categories': set(), 'num_classes': set(), 'min_size': {'one', 'two'},
    'max_size': {'one', 'two'}, 'trainable_layers': {'zero', 'one', 'two'}, 'backbone_kwargs': set(),
    'detections_per_img': {'one', 'two'}, 'score_thresh': FRACTIONS, 'nms_thresh': FRACTIONS,
    'image_mean': {'null', 'zeros', 'colour'}, 'image_std': {'null', 'colour'}, 'strides': set(), 'in_channels': set(),
    'anchor_generator': set(), 'proposal_matcher': set(), 'head': set(), 'fixed_size': set()}
FIELDS_OF_DETECTOR = {
    'retinanet': {
        'topk_candidates': {'one', 'two'}, 'fg_iou_thresh': {'one', 'fraction'}, 'bg_iou_thresh': {'zero', 'fraction'},
        'positive_fraction': set(), 'batch_size_per_image': set()},
    'cascade_rcnn': {
        'topk_candidates': set(), 'fg_iou_thresh': set(), 'bg_iou_thresh': set(), 'positive_fraction': FRACTIONS,
        'batch_size_per_image': {'one', 'two'}}}


@pytest.mark.parametrize('detector', BUILDERS)
def test_every_field_of_a_config_with_values_of_every_type(tmp_path, monkeypatch, detector):
    """An accepted value reaches the creation of the backbone; any other gives an error of one line."""
    class Accepted(Exception):
        pass

    def create(name, *args, **kwargs):
        raise create_body(name, *args, **kwargs) if (name, kwargs) != ('resnet18', {}) else Accepted()

    monkeypatch.setattr('timm_spa.detection.models.create_body', create)
    config = dict(
        detector=detector, backbone='resnet18', num_classes=3, min_size=64, max_size=96, backbone_kwargs={},
        categories=[dict(id=i, name=str(i)) for i in range(3)])
    for field, accepted in {**FIELDS, **FIELDS_OF_DETECTOR[detector]}.items():
        for kind, value in VALUES.items():
            (tmp_path / 'config.json').write_text(json.dumps(dict(config, **{field: value})))
            if kind in accepted or field == 'backbone_kwargs' and kind in ('null', 'dict'):
                with pytest.raises(Accepted):
                    load_detector(tmp_path)
                continue
            with pytest.raises(DetectionError) as e:
                load_detector(tmp_path)
            assert '\n' not in str(e.value)
            assert field.removesuffix('_kwargs') in str(e.value) or repr(value) in str(e.value), (field, kind)
    for category in (
            dict(id=1), dict(name='a'), dict(id=1, name=1), dict(id=1, name=['a']), dict(id=1, name='0'), 'abc', None,
            1):
        (tmp_path / 'config.json').write_text(json.dumps(dict(
            config, categories=[dict(id=0, name='0'), category, dict(id=2, name='2')])))
        message = 'categories must be a list of classes, each with an id and a unique name'
        with pytest.raises(DetectionError, match=message):
            load_detector(tmp_path)
