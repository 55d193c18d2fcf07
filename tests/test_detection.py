"""Detectors: their parts against results computed by hand, and training of a small one."""
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from coco_files import write_rectangles
from marks import slow_unless
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

import timm_spa
from timm_spa.detection import DetectionError, cascade_rcnn, load_detector, retinanet, save_detector
from timm_spa.detection.backbone import Backbone, create_body
from timm_spa.detection.cascade import DELTA_STDS, CascadeRoIHeads, decode_boxes, encode_boxes, pyramid_levels
from timm_spa.detection.data import CocoDataset, find_dataset
from timm_spa.detection.models import check_image_size
from timm_spa.detection.train import Settings, train
from timm_spa.hub import CheckpointError

ROOT = Path(__file__).parent.parent
BUILDERS = {'retinanet': retinanet, 'cascade_rcnn': cascade_rcnn}
SMALL = dict(num_classes=3, pretrained_backbone=False, min_size=64, max_size=96)
RESNETS = [name for name in timm_spa.list_models('*resnet*') if 'cifar' not in name]


def trainable_millions(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6


@pytest.mark.parametrize(('detector', 'backbone', 'expected', 'tolerance'), [
    ('retinanet', 'resnet50', 37.7433, 0.0001),
    ('retinanet', 'seresnet50', 40.2489, 0.0001),
    ('retinanet', 'spa_resnet50', 40.25, 0.02),  # the gates of the frozen first stage are not counted here
    ('cascade_rcnn', 'resnet50', 69.1694, 0.0001),
    ('cascade_rcnn', 'seresnet50', 71.6750, 0.0001),
    ('cascade_rcnn', 'spa_resnet50', 71.67, 0.02),
])
def test_trainable_parameters_match_the_paper(detector, backbone, expected, tolerance):
    """Table VI counts trainable parameters. The exact figures were counted in mmdetection."""
    with torch.device('meta'):
        model = BUILDERS[detector](backbone, pretrained_backbone=False)
    assert trainable_millions(model) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize('name', slow_unless(
    lambda name: name in ('gated', 'spa_resnet18', 'spa_b_resnet50', 'spa_c_resnet34', 'cbam_resnet50'),
    [*RESNETS, 'gated']))
def test_every_resnet_builds(name):
    kwargs = dict(base='resnet18') if name == 'gated' else {}
    for builder in BUILDERS.values():
        with torch.device('meta'):
            model = builder(name, pretrained_backbone=False, backbone_kwargs=kwargs)
        assert {p.requires_grad for p in model.backbone.body.parameters()} == {True, False}


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('spa_b_resnet50', {}), ('densenet121', {}), ('convnext_atto', {}), ('gated', dict(base='regnety_002'))])
def test_other_models_return_feature_maps_of_the_strides(name, kwargs):
    with torch.device('meta'):
        backbone = Backbone(create_body(name, False, **kwargs), (4, 8, 16, 32))
        levels = backbone(torch.rand(2, 3, 128, 96))
    assert [tuple(level.shape) for level in levels.values()] == [
        (2, 256, 128 // s, 96 // s) for s in (4, 8, 16, 32)] + [(2, 256, 2, 2)]


@pytest.mark.parametrize(('name', 'stages'), [
    ('resnet18', [('conv1', 'bn1'), ('layer1',), ('layer2',), ('layer3',), ('layer4',)]),
    ('spa_mobilenetv2_050', [
        ('conv_stem', 'bn1', 'blocks.0'), ('blocks.1',), ('blocks.2',), ('blocks.3', 'blocks.4'),
        ('blocks.5', 'blocks.6')])])
def test_frozen_stages(name, stages):
    for count in range(6):
        body = Backbone(create_body(name, False), (8, 16, 32), count, p6p7=True).body
        frozen = tuple(part.replace('.', '_') for stage in stages[:5 - count] for part in stage)
        for key, parameter in body.named_parameters():
            assert parameter.requires_grad != key.replace('.', '_').startswith(frozen or ('nothing',)), key


@pytest.mark.parametrize('pyramid_sizes', [(1, 4, 7), (1,)])
def test_statistics_of_norm_layers_are_frozen(pyramid_sizes):
    """Norm layers of trainable gates are an exception, unless one image has only one value per channel."""
    kwargs = dict(zero_init_last=False, pyramid_sizes=pyramid_sizes)
    model = retinanet('spa_resnet18', **SMALL, backbone_kwargs=kwargs)
    before = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k or 'num_batches' in k}
    assert len(before) > 20
    assert model.training
    assert model.backbone.body.layer1.training
    sum(model([torch.rand(3, 64, 64)], [target()]).values()).backward()
    updated = {k for k, v in before.items() if not torch.equal(v, model.state_dict()[k])}
    assert updated == {k for k in before if '.attn.' in k and '.layer1.' not in k and len(pyramid_sizes) > 1}
    assert model.backbone.body.layer2[0].bn1.weight.grad.abs().sum() > 0
    assert model.backbone.body.layer1[0].bn1.weight.grad is None


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}


@pytest.mark.parametrize('gate', ['spa', 'spa_one_cell', 'ge_conv', 'se', 'ge', 'cbam', 'gc'])
@pytest.mark.parametrize('size', [32, 64, 256, 320])
def test_one_small_image_per_batch(gate, size):
    """Norm layers of gates update their statistics, except for feature maps of one cell."""
    torch.manual_seed(0)
    kwargs = dict(pyramid_sizes=(1,)) if gate == 'spa_one_cell' else {}
    body = create_body('gated', False, base='resnet18', gate=gate.partition('_one')[0], neutral=False, **kwargs)
    backbone = Backbone(body, (8, 16, 32), 5)
    before, cells = statistics(backbone), {}

    def record_cells(name):
        return lambda module, inputs: cells.update({name: inputs[0].shape[2:].numel()})

    for name, module in backbone.named_modules():
        if '.attn' in name and isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(record_cells(name))
    levels = backbone(torch.rand(1, 3, size, size))
    assert all(level.isfinite().all() for level in levels.values())
    after = statistics(backbone)
    updated = {name.rpartition('.')[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert updated == {name for name, count in cells.items() if count > 1}
    if gate == 'ge_conv':
        assert (len(updated) < len(cells)) == (size <= 256)
    assert all(m.training for name, m in backbone.named_modules() if name in cells), 'the mode is restored'
    before = statistics(backbone.eval())
    backbone(torch.rand(1, 3, size, size))
    assert all(torch.equal(value, before[name]) for name, value in statistics(backbone).items())
    assert not any(m.training for m in backbone.modules())


@pytest.mark.parametrize('detector', BUILDERS)
def test_a_step_with_one_small_image(detector):
    torch.manual_seed(0)
    model = BUILDERS[detector]('gated', **SMALL, backbone_kwargs=dict(base='resnet18', gate='ge_conv'))
    losses = model([torch.rand(3, 64, 64)], [target()])
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())


def test_invalid_backbones():
    with pytest.raises(DetectionError, match='lacks a feature map of stride 16: its strides are 1, 1, 2, 4, 8'):
        retinanet('spa_preresnet18_cifar', **SMALL)
    with pytest.raises(DetectionError, match="Unknown model 'spa_resnet51'. Did you mean spa_resnet"):
        retinanet('spa_resnet51', **SMALL)
    with pytest.raises(DetectionError, match='trainable_layers must be a whole number from 0 to 5, got 6'):
        Backbone(create_body('resnet18', False), (8, 16, 32), 6)


@pytest.mark.parametrize(('key', 'value'), [
    ('min_size', 5000), ('max_size', 8193), ('min_size', (64, 96)), ('num_classes', 100_001), ('trainable_layers', 6),
    ('num_classes', 0), ('num_classes', True), ('min_size', 0), ('max_size', 1.5)])
@pytest.mark.parametrize('detector', BUILDERS)
def test_arguments_out_of_range(detector, key, value):
    with pytest.raises(DetectionError, match=f'{detector}: {key} must be a whole number from . to .*, got '):
        BUILDERS[detector]('resnet18', **dict(SMALL, **{key: value}))


@pytest.mark.parametrize('detector', BUILDERS)
def test_images_that_are_too_narrow(detector):
    model = BUILDERS[detector]('resnet18', **SMALL).eval()
    with torch.no_grad():
        model([torch.rand(3, 288, 3)])  # the shorter side becomes one pixel
    check_image_size(model, 3, 288, 'a.png')
    with pytest.raises(DetectionError, match='a.png: 2 x 288 pixels are too narrow'):
        check_image_size(model, 2, 288, 'a.png')


def test_images_are_normalized_as_in_the_training_of_the_backbone():
    for builder in BUILDERS.values():
        with torch.device('meta'):
            model = builder('tf_efficientnet_lite0', **SMALL)
        assert model.transform.image_mean == [0.5, 0.5, 0.5]


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', num_classes=7)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain.eval().forward_features(x)
        for name, kwargs in (('resnet18', {}), ('spa_resnet18', {}), ('gated', dict(base='resnet18'))):
            body = create_body(name, tmp_path / 'plain.safetensors', **kwargs).eval()
            torch.testing.assert_close(body(x)[-1], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match='does not fit spa_resnet34. Compared with the plain model'):
        create_body('spa_resnet34', tmp_path / 'plain.safetensors')


@pytest.mark.parametrize('detector', BUILDERS)
def test_detectors_start_from_a_file(tmp_path, detector):
    plain = timm.create_model('resnet18', num_classes=2)
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    kwargs = dict(SMALL, pretrained_backbone=tmp_path / 'plain.safetensors')
    body = BUILDERS[detector]('resnet18', **kwargs).backbone.body
    assert torch.equal(body.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)


def test_settings_are_those_of_mmdetection():
    with torch.device('meta'):
        retina, cascade = (build('resnet18', pretrained_backbone=False) for build in BUILDERS.values())
    for model in (retina, cascade):
        assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    assert (retina.score_thresh, retina.nms_thresh, retina.detections_per_img) == (0.05, 0.5, 100)
    assert retina.topk_candidates == 1000
    assert (retina.proposal_matcher.high_threshold, retina.proposal_matcher.low_threshold) == (0.5, 0.4)
    rpn, heads = cascade.rpn, cascade.roi_heads
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert rpn.anchor_generator.aspect_ratios == ((0.5, 1, 2),) * 5
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (dict(training=2000, testing=1000),) * 2
    assert rpn.nms_thresh == 0.7
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert (heads.batch_size_per_image, heads.max_positives) == (512, 128)


@pytest.mark.parametrize('detector', BUILDERS)
def test_given_mean_and_standard_deviation(detector):
    with torch.device('meta'):
        model = BUILDERS[detector]('resnet18', **SMALL, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert model.transform.image_mean == model.detector_config['image_mean'] == [0.1, 0.2, 0.3]
    assert model.transform.image_std == model.detector_config['image_std'] == [0.4, 0.5, 0.6]
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)


def test_p6_is_computed_from_the_last_feature_map_of_the_backbone():
    """Also if it has as many channels as the pyramid, where torchvision uses the last level of the pyramid."""
    body = create_body('resnet18', False, channels=(32, 64, 128, 256))
    backbone = Backbone(body, (8, 16, 32), p6p7=True).eval()
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(list(backbone(x).values())[3], backbone.fpn.extra_blocks.p6(body(x)[-1]))


@pytest.mark.parametrize(('name', 'num_classes', 'classifier'), [
    ('resnet18', 0, ''), ('legacy_seresnet18', 4, 'last_linear.weight'), ('repvit_m0_9', 4, 'head.head.bn.weight')])
def test_weights_from_a_file_without_a_usual_classifier(tmp_path, name, num_classes, classifier):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=num_classes)
    for key, tensor in plain.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if 'var' in key else tensor.normal_(std=0.1)
    assert not classifier or classifier in plain.state_dict()
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    body = create_body(name, tmp_path / 'plain.safetensors').eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(body(x)[-1], plain.eval().forward_features(x), rtol=1e-4, atol=1e-4)
    tensors = dict(plain.state_dict(), foreign=torch.zeros(1))
    safetensors.torch.save_file(tensors, tmp_path / 'plain.safetensors')
    with pytest.raises(CheckpointError, match='1 unexpected: foreign'):
        create_body(name, tmp_path / 'plain.safetensors')


def target(boxes=((8., 8, 40, 48), (30, 4, 60, 20)), labels=(0, 2)):
    return dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.long))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(labels=[0, 3]),
     r'the label 3 is out of range\. The labels of a detector with num_classes=3 are 0 to 2\. The'),
    (dict(labels=[-1, 2]), 'the label -1 is out of range'),
    (dict(labels=[0., 2]), r'labels are torch\.float32\. Give the numbers 0 to 2 as torch\.int64'),
    (dict(labels=[True, False]), r'labels are torch\.bool'),
    (dict(labels=torch.tensor([0, 2], dtype=torch.uint8)), r'labels are torch\.uint8'),
    (dict(labels=[0]), r'boxes have the shape \[2, 4\] and labels \[1\]\. Expected \(T, 4\)'),
    (dict(labels=[[0], [1]]), r'boxes have the shape \[2, 4\] and labels \[2, 1\]'),
    (dict(labels=None), 'labels is not a tensor'),
    (dict(boxes=[]), r'boxes have the shape \[0\]'),
    (dict(boxes=[[8., 8, 40, 48], [60, 4, 30, 20]]), r'the box \[60.0, 4.0, 30.0, 20.0\] has no area'),
    (dict(boxes=[[8., 8, 40, 48], [30, 4, 60, 4]]), 'has no area'),
    (dict(boxes=[[8., 8, 40, 48], [30, 4, math.nan, 20]]), 'has no area'),
    (dict(boxes=[[8., 8, 40, 48], [30, 4, math.inf, 20]]), 'has no area'),
    (None, 'one target per image, got 2 images and 1 targets'),
])
def test_invalid_targets(detectors, changes, message):
    """The second target is invalid. Unchecked, label -1 would be the last class, and label 3 the background."""
    second = changes and dict(target(), **{
        key: torch.tensor(value) if isinstance(value, list) else value for key, value in changes.items()})
    for model in detectors.values():
        with pytest.raises(DetectionError, match=message):
            model([torch.rand(3, 64, 64)] * 2, [target(), second] if second else [target()])


def test_training_without_targets(detectors):
    for model in detectors.values():
        with pytest.raises(DetectionError, match='one target per image, got 1 images and no targets'):
            model([torch.rand(3, 64, 64)])
        for mode in (True, False):
            with pytest.raises(DetectionError, match='at least one image'):
                model.train(mode)([], [])
        model.train()


@pytest.fixture(scope='module')
def detectors():
    return {name: build('resnet18', **SMALL) for name, build in BUILDERS.items()}


@pytest.mark.parametrize('detector', BUILDERS)
def test_losses_and_gradients(detector):
    """Images of different sizes, one of them without boxes; then only the image without boxes."""
    torch.manual_seed(0)
    kwargs = dict(batch_size_per_image=64) if detector == 'cascade_rcnn' else {}
    model = BUILDERS[detector]('spa_resnet18', **SMALL, **kwargs, backbone_kwargs=dict(zero_init_last=False))
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 50)]
    targets = [target(), target((), ())]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert len(losses) == (2 if detector == 'retinanet' else 8)
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # the gates start at 1/2, so their first layers have no gradient
    assert [n for n in without if '.attn.' not in n] == []
    model.zero_grad(set_to_none=True)
    losses = model(images[1:], targets[1:])
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize('detector', BUILDERS)
def test_detections(detector):
    torch.manual_seed(0)
    kwargs = dict(score_thresh=0.001) if detector == 'retinanet' else {}
    model = BUILDERS[detector]('resnet18', **SMALL, **kwargs).eval()
    sizes = [(200, 120), (50, 60)]
    with torch.no_grad():
        detections = model([torch.rand(3, *size) for size in sizes])
    for detection, (height, width) in zip(detections, sizes, strict=True):
        assert detection.keys() == {'boxes', 'labels', 'scores'}
        boxes, labels, scores = (detection[key] for key in ('boxes', 'labels', 'scores'))
        assert 0 < len(boxes) == len(labels) == len(scores) <= 100
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width + 1e-3
        assert boxes[:, 3].max() <= height + 1e-3
        assert set(labels.tolist()) <= {0, 1, 2}
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    largest = max(detection['boxes'].max() for detection in detections)
    assert largest > 100, 'boxes are in pixels of the image, not of the resized image'


@pytest.mark.parametrize('detector', BUILDERS)
def test_mixed_precision(detector):
    model = BUILDERS[detector]('resnet18', **SMALL)
    images, targets = [torch.rand(3, 64, 64)], [target()]
    torch.manual_seed(0)
    expected = model(images, targets)
    torch.manual_seed(0)
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(images, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.02)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        detections = model.eval()(images)
    assert detections[0]['boxes'].dtype == torch.float32


# the head of Cascade R-CNN

def test_encoding_by_hand():
    boxes, targets = torch.tensor([[0., 0, 10, 20]]), torch.tensor([[5., 10, 25, 20]])
    # centres (5, 10) and (15, 15), sides (10, 20) and (20, 10)
    expected = torch.tensor([[1 / 0.1, 0.25 / 0.1, math.log(2) / 0.2, -math.log(2) / 0.2]])
    torch.testing.assert_close(encode_boxes(boxes, targets, DELTA_STDS[0]), expected)
    torch.testing.assert_close(encode_boxes(boxes, targets, DELTA_STDS[1]), 2 * expected)
    torch.testing.assert_close(encode_boxes(boxes, targets, DELTA_STDS[2]), 3 * expected)


def test_decoding_undoes_encoding():
    generator = torch.Generator().manual_seed(0)
    boxes, targets = torch.rand(2, 50, 4, generator=generator) * 50
    for b in (boxes, targets):
        b[:, 2:] += b[:, :2] + 1
    for stds in DELTA_STDS:
        deltas = encode_boxes(boxes, targets, stds)
        torch.testing.assert_close(decode_boxes(boxes, deltas, stds, (200, 200)), targets, rtol=1e-4, atol=1e-3)
    clipped = decode_boxes(boxes, torch.full((50, 4), 1e4), DELTA_STDS[0], (30, 40))
    assert clipped.isfinite().all()
    assert clipped[:, 2].max() <= 40
    assert clipped[:, 3].max() <= 30


def test_levels_by_hand():
    sides = torch.tensor([1., 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    assert pyramid_levels(boxes, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pyramid_levels(torch.tensor([[0., 0, 56, 224], [5, 5, 5, 5]]), 4).tolist() == [1, 0], 'by area'


def ramps(height, width):
    """Returns feature maps whose values are the x coordinates of their cell centres, in pixels of the image."""
    return {
        str(s): ((torch.arange(width // s) + 0.5) * s).expand(2, 1, height // s, width // s) for s in (4, 8, 16, 32)}


def test_regions_are_read_inside_the_boxes():
    heads = CascadeRoIHeads(1, 2)
    boxes = [torch.tensor([[40., 40, 96, 96], [32, 32, 256, 256]]), torch.tensor([[100., 32, 240, 172]])]
    regions = heads._regions(ramps(320, 320), boxes)
    assert regions.shape == (3, 1, 7, 7)
    for region, box in zip(regions, torch.cat(boxes), strict=True):
        centres = box[0] + (torch.arange(7) + 0.5) * (box[2] - box[0]) / 7
        torch.testing.assert_close(region[0], centres.expand(7, 7))


@pytest.mark.parametrize(('threshold', 'objects'), [(0.5, 3), (0.6, 2), (0.7, 2)])
def test_sampling_by_overlap(threshold, objects):
    heads = CascadeRoIHeads(1, 5)
    true_boxes, labels = torch.tensor([[0., 0, 100, 100]]), torch.tensor([4])
    # overlaps 0.8, 0.55 and 0.2
    boxes = torch.tensor([[0., 0, 100, 80], [0, 0, 100, 55], [0, 0, 100, 20]])
    drawn, drawn_labels, targets, is_true = heads._sample(boxes, true_boxes, labels, threshold)
    assert len(drawn) == 4
    assert (drawn_labels == 4).sum() == objects
    assert (drawn_labels == 5).sum() == 4 - objects
    assert torch.equal((drawn_labels == 4), box_iou(drawn, true_boxes)[:, 0] >= threshold)
    assert torch.equal(targets, true_boxes.expand(4, 4))
    assert torch.equal(drawn[is_true], true_boxes)


def test_an_iou_equal_to_the_threshold_is_an_object():
    true_boxes, boxes = torch.tensor([[0., 0, 100, 100]]), torch.tensor([[0., 0, 100, 50]])
    _, labels, _, _ = CascadeRoIHeads(1, 5)._sample(boxes, true_boxes, torch.tensor([4]), 0.5)
    assert labels.tolist() == [4, 4]


def test_sampling_is_limited():
    heads = CascadeRoIHeads(1, 5)
    true_boxes = torch.tensor([[0., 0, 100, 100]])
    near, far = torch.tensor([0., 0, 100, 90]).expand(1000, 4), torch.tensor([0., 0, 100, 9]).expand(1000, 4)
    _, labels, _, _ = heads._sample(torch.cat([near, far]), true_boxes, torch.tensor([2]), 0.5)
    assert [(labels == 2).sum(), (labels == 5).sum()] == [128, 384]
    _, labels, _, is_true = heads._sample(far, true_boxes[:0], torch.tensor([], dtype=torch.long), 0.5)
    assert labels.tolist() == [5] * 512
    assert not is_true.any()


def stubbed(*outputs):
    """Returns cascade heads with fixed logits and deltas for each stage, and a list of the boxes of each stage."""
    heads = CascadeRoIHeads(1, 2)
    boxes_of_stages = []
    heads._regions = lambda features, boxes: boxes_of_stages.append(boxes) or boxes
    for head, (scores, deltas) in zip(heads.heads, outputs, strict=True):
        head.forward = lambda boxes, s=scores, d=deltas: (
            torch.tensor(s).expand(sum(map(len, boxes)), -1), torch.tensor(d).expand(sum(map(len, boxes)), -1))
    return heads, boxes_of_stages


def test_each_stage_starts_from_the_boxes_of_the_previous_stage():
    """Each stage moves the box by a tenth of its side. The logits of all stages are averaged."""
    heads, boxes_of_stages = stubbed(
        ([2., 0, 0], [1., 0, 0, 0]), ([0., 4, 0], [2., 0, 0, 0]), ([1., 2, 3], [3., 0, 0, 0]))
    (detection,), losses = heads.eval()({}, [torch.tensor([[0., 0, 10, 10]])], [(100, 100)])
    assert losses == {}
    assert [boxes[0][0].tolist() for boxes in boxes_of_stages] == [
        pytest.approx([x, 0, x + 10, 10]) for x in (0, 1, 2)]
    expected = torch.tensor([1., 2, 1]).softmax(0)  # the mean of the three
    assert detection['labels'].tolist() == [1, 0]
    torch.testing.assert_close(detection['scores'], expected[[1, 0]])
    torch.testing.assert_close(detection['boxes'], torch.tensor([[3., 0, 13, 10]]).expand(2, 4))


def test_weak_and_duplicate_detections_are_dropped():
    heads = CascadeRoIHeads(1, 2, detections_per_img=2)
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [80, 80, 90, 90]])
    scores = torch.tensor([[0.5, 0.04], [0.9, 0.3], [0.2, 0.01], [0.1, 0]])
    detection = heads._best(boxes, scores)
    assert detection['scores'].tolist() == pytest.approx([0.9, 0.3]), 'the best two; 0.5 overlaps 0.9 of its class'
    assert detection['labels'].tolist() == [0, 1]


def test_detections_need_a_score_above_the_threshold():
    detection = CascadeRoIHeads(1, 2)._best(torch.tensor([[0., 0, 10, 10]]), torch.tensor([[0.051, 0.049]]))
    assert detection['labels'].tolist() == [0]


def test_losses_by_hand():
    even = [0., 0, 0]
    heads, boxes_of_stages = stubbed(*[(even, [0., 0, 0, 0])] * 3)
    proposals = [torch.tensor([[0., 0, 100, 80]])]  # IoU 0.8: an object in each stage
    targets = [target([[0., 0, 100, 100]], [1])]
    _, losses = heads({}, proposals, [(200, 200)], targets)
    assert all(len(boxes[0]) == 2 for boxes in boxes_of_stages), 'the proposal and the true box, added in each stage'
    for stage, weight in enumerate((1, 0.5, 0.25)):
        assert losses[f'loss_classifier_{stage}'].item() == pytest.approx(weight * math.log(3))
        deltas = [(stage + 1) * v for v in (10 / 80 / 0.1, math.log(100 / 80) / 0.2)]
        smooth = sum(v - 0.5 if v > 1 else v * v / 2 for v in deltas)
        assert losses[f'loss_box_reg_{stage}'].item() == pytest.approx(weight * smooth / 2), 'averaged over two boxes'


def test_no_gradient_flows_through_the_boxes_of_a_stage():
    heads, boxes_of_stages = stubbed(*[([0., 0, 0], [0., 0, 0, 0])] * 3)
    for head in heads.heads:
        head.forward = lambda boxes: (
            torch.zeros(sum(map(len, boxes)), 3), torch.zeros(sum(map(len, boxes)), 4, requires_grad=True))
    heads({}, [torch.tensor([[0., 0, 100, 80]])], [(200, 200)], [target([[0., 0, 100, 100]], [1])])
    assert [boxes[0].requires_grad for boxes in boxes_of_stages] == [False] * 3


def test_initialization_of_heads():
    head = CascadeRoIHeads(4, 80).heads[0]
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.regressor.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not any(layer.bias.any() for layer in (head.fc1, head.fc2, head.classifier, head.regressor))


def test_no_proposals_and_no_targets():
    heads = CascadeRoIHeads(4, 2)
    features = {str(s): torch.rand(1, 4, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16, 32)}
    _, losses = heads(features, [torch.zeros(0, 4)], [(64, 64)], [target((), ())])
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    (detection,), _ = heads.eval()(features, [torch.zeros(0, 4)], [(64, 64)])
    assert detection['boxes'].shape == (0, 4)


# checkpoints

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


@pytest.mark.slow
def test_a_detector_learns_eight_images(tmp_path):
    """Starts from the weights that come with the package, without a network connection."""
    folder = write_rectangles(tmp_path / 'data', repeats=8)
    train_set = CocoDataset(*find_dataset(folder, 'train'))
    val_set = CocoDataset(*find_dataset(folder, 'val'), categories=train_set.categories)
    assert len(val_set) == 8
    torch.manual_seed(0)
    model = retinanet('spa_tf_efficientnet_lite0.grocery81', num_classes=3, min_size=96, max_size=96)
    settings = Settings(epochs=3, batch_size=4, lr=0.015, decay_epochs=(2,), warmup_steps=20, clip_grad=10)
    rows = train(model, train_set, val_set, tmp_path / 'run', settings, cpu=True, log=lambda line: None)
    assert rows[-1]['eval_ap50'] >= 90, rows
    assert rows[-1]['eval_ap50'] >= rows[-1]['eval_map'] > 50


@pytest.mark.parametrize('name', ['resnet50', 'seresnet50', 'gc_resnet50', 'spa_resnet50'])
def test_multiply_adds_of_the_documentation(name):
    """At 1280x800, on the meta device. The cascade heads are counted by hand, for 1,000 regions and 80 classes."""
    rows = [line.strip('| ').split(' | ') for line in (ROOT / 'docs' / 'detection.md').read_text().splitlines()]
    (row,) = (cells for cells in rows if cells[0] == f'`{name}`')
    head = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 4)
    for build, regions, documented in ((retinanet, 0, row[2]), (cascade_rcnn, 3 * 1000 * head, row[4])):
        with torch.device('meta'):
            model = build(name, 80, pretrained_backbone=False).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                levels = list(model.backbone(torch.empty(1, 3, 800, 1280)).values())
                (model.head if build is retinanet else model.rpn.head)(levels)
        assert f'{(counter.get_total_flops() / 2 + regions) / 1e9:.2f}' == documented
