"""Detectors: their parts against results computed by hand, and training of a small one."""
import math
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from coco_files import write_rectangles
from marks import slow_unless
from torch.utils.flop_counter import FlopCounterMode

import timm_spa
from timm_spa.detection import DetectionError, cascade_rcnn, retinanet
from timm_spa.detection.backbone import Backbone, create_body
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


@pytest.mark.quick(10)
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
