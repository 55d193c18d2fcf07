"""The plug-in for mmdet: its configs, and its backbone compared with timm's feature maps and mmdet's own ResNet."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from coco_files import write_rectangles

from timm_spa.detection import DetectionError
from timm_spa.hub import CheckpointError

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / 'train_scripts' / 'detection' / 'mmdet'
PLUGIN = 'timm_spa.detection.mmdet'


@pytest.fixture(scope='module')
def build():
    """Function that builds a model from a dictionary or from a config."""
    pytest.importorskip('mmdet', reason='needs mmdet: pip install "timm_spa[mmdet]"')
    import mmcv_ops  # noqa: F401
    importlib.import_module(PLUGIN)
    from mmdet.registry import MODELS
    return MODELS.build


def read(name):
    from mmengine.config import Config
    return Config.fromfile(CONFIGS / f'{name}_2x.py')


@pytest.mark.parametrize(('detector', 'backbone', 'expected'), [
    ('retinanet', 'resnet50', 37.7433), ('cascade_rcnn', 'resnet50', 69.1694),
    ('retinanet', 'seresnet50', 40.2489), ('cascade_rcnn', 'seresnet50', 71.6750),
    ('retinanet', 'gc_resnet50', 40.2651), ('cascade_rcnn', 'gc_resnet50', 71.6912),
    ('retinanet', 'spa_resnet50', 40.2355), ('cascade_rcnn', 'spa_resnet50', 71.6616)])
def test_trainable_parameters_of_the_configs(build, detector, backbone, expected):
    """The numbers of torchvision's detectors (docs/detection.md), and of mmdet with its own ResNet."""
    config = read(f'{detector}_{backbone}')
    with torch.device('meta'):
        model = build(config.model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert count == pytest.approx(expected, abs=0.00006)
    assert config.model.backbone.model == backbone
    assert config.model.backbone.pretrained
    assert config.optim_wrapper.optimizer.lr == {'retinanet': 0.01, 'cascade_rcnn': 0.02}[detector]
    assert config.train_cfg.max_epochs == 24
    assert config.param_scheduler[1].milestones == [18, 22]
    assert config.custom_hooks == [dict(type='SyncBuffersHook')]


@pytest.mark.parametrize(('name', 'kwargs', 'indices'), [
    ('resnet18', {}, (1, 2, 3, 4)), ('spa_resnet18', {}, (0, 3)), ('tf_efficientnet_lite0', {}, (2, 3, 4)),
    ('gated', dict(base='regnety_002', neutral=False), (1, 4))])
def test_feature_maps_match_timm(build, name, kwargs, indices):
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True, out_indices=indices, **kwargs).eval()
    backbone = build(dict(type='TimmBackbone', model=name, out_indices=indices, frozen_stages=1, **kwargs)).eval()
    backbone.body.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), tuple(plain(x)), rtol=0, atol=0)


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
@pytest.mark.parametrize('norm_eval', [True, False])
def test_frozen_layers_match_resnet_of_mmdet(build, frozen_stages, norm_eval):
    kwargs = dict(frozen_stages=frozen_stages, norm_eval=norm_eval)
    with torch.device('meta'):
        ours = build(dict(type='TimmBackbone', model='resnet18', **kwargs))
        theirs = build(dict(type='ResNet', depth=18, **kwargs))

    def trainable(model):
        parameters = {key for key, p in model.named_parameters() if p.requires_grad}
        return parameters, {key for key, m in model.named_modules() if hasattr(m, 'running_mean') and m.training}

    for model in (ours, theirs):
        model.train()
    assert trainable(ours.body) == trainable(theirs)


def small(detector, **backbone):
    """Returns the model of a config, with SPA-ResNet-18 as its backbone."""
    model = read(f'{detector}_spa_resnet50').model
    model.backbone.update(dict(dict(model='spa_resnet18', pretrained=False, zero_init_last=False), **backbone))
    model.neck.in_channels = [64, 128, 256, 512]
    if detector == 'cascade_rcnn':  # fewer boxes, because each costs 13 million multiply-adds per head
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 30
    return model


def batch():
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    samples = []
    for size in ((64, 96), (96, 64)):
        boxes = torch.tensor([[8., 8, 40, 48], [30, 4, 60, 20]])
        sample = DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=torch.tensor([0, 2])))
        sample.set_metainfo(dict(img_shape=size, ori_shape=size, scale_factor=(1., 1.)))
        samples.append(sample)
    return dict(inputs=[(torch.rand(3, *s.img_shape) * 255).byte() for s in samples], data_samples=samples)


@pytest.mark.parametrize('detector', ['retinanet', 'cascade_rcnn'])
def test_two_steps(build, detector):
    torch.manual_seed(0)
    model = build(small(detector))
    model.init_weights()
    body = model.backbone.body
    gates = {key: p for key, p in body.named_parameters() if '.attn.' in key}
    for p in gates.values():
        torch.nn.init.normal_(p, std=0.1)  # at their initial values, their last layers block the gradient
    statistics = {key: b.clone() for key, b in body.named_buffers()}
    data = model.train().data_preprocessor(batch(), training=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.002)
    totals = []
    for _ in range(3):
        torch.manual_seed(1)  # Cascade R-CNN draws boxes
        total, _ = model.parse_losses(model(**data, mode='loss'))
        totals.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert totals[0] > totals[1] > totals[2]
    frozen = {key for key, _ in body.named_parameters() if key.startswith(('conv1', 'bn1', 'layer1.'))}
    assert {key for key, p in body.named_parameters() if p.grad is None} == frozen
    assert len(gates) > 4 * len(frozen & gates.keys()) / 2 > 0
    assert [key for key, p in gates.items() if key not in frozen and not p.grad.any()] == []
    updated = {key for key, b in body.named_buffers() if not torch.equal(b, statistics[key])}
    assert updated == {key for key in statistics if '.attn.' in key and not key.startswith('layer1.')}
    with torch.no_grad():
        samples = model.eval()(**model.data_preprocessor(batch()), mode='predict')
    assert all(len(sample.pred_instances.bboxes) <= 100 for sample in samples)


def test_weights_from_a_file(build, tmp_path):
    """The backbone is built without the file, which only init_weights reads. An evaluation does not need the file."""
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', num_classes=7).eval()
    file = tmp_path / 'plain.safetensors'
    backbone = build(dict(type='TimmBackbone', model='resnet18', pretrained=str(file)))
    with pytest.raises(CheckpointError, match=f'^{re.escape(str(file))} does not exist.$'):
        backbone.init_weights()
    safetensors.torch.save_file(plain.state_dict(), file)
    detector = build(small('retinanet', pretrained=str(file)))
    detector.init_weights()
    assert torch.equal(detector.backbone.body.conv1.weight, plain.conv1.weight)
    x = torch.rand(1, 3, 64, 64)
    for name, kwargs in (('resnet18', {}), ('spa_resnet18', {}), ('gated', dict(base='resnet18'))):
        backbone = build(dict(type='TimmBackbone', model=name, pretrained=str(file), **kwargs)).eval()
        backbone.init_weights()
        with torch.no_grad():
            torch.testing.assert_close(backbone(x)[-1], plain.forward_features(x), rtol=1e-4, atol=1e-4)


def test_invalid_arguments(build):
    for kwargs, message in (
            (dict(model='spa_resnet51'), "Unknown model 'spa_resnet51'"),
            (dict(model='resnet18', frozen_stages=5), 'frozen_stages must be a whole number from -1 to 4, got 5'),
            (dict(model='resnet18', out_indices=(3, 7)), 'resnet18 cannot be the backbone of a detector'),
            (dict(model='resnet18', depth=50), 'depth')):
        with pytest.raises(DetectionError, match=message):
            build(dict(type='TimmBackbone', **kwargs))


@pytest.mark.parametrize(('missing', 'message'), [
    ('mmdet', r'^timm_spa\.detection\.mmdet cannot be imported: it needs mmdet \([^\n]*\)\. Install it: pip install '
     r'"timm_spa\[mmdet\]"\.$'),
    ('mmcv.ops', r'^timm_spa\.detection\.mmdet cannot be imported: the compiled operators of mmcv cannot be loaded '
     r'\([^\n]*\)\. Build onedl-mmcv for torch [^\n]*\.$')],
    ids=['mmdet', 'operators'])
def test_missing_packages(monkeypatch, request, missing, message):
    """Raise an ImportError of one line, which a program can catch."""
    if missing != 'mmdet':
        request.getfixturevalue('build')
    for name in [name for name in sys.modules if name == PLUGIN or name.split('.')[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DetectionError, match=message) as e:
        importlib.import_module(PLUGIN)
    assert isinstance(e.value, ImportError)


def overlap(a, b):
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (sum(areas) - inter)


def test_nms_of_mmcv(build):
    """mmcv.ops, compiled or replaced by torchvision's: sorted boxes, without those that overlap a better one."""
    from mmcv.ops import nms
    torch.manual_seed(0)
    corners = torch.rand(60, 2) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(60, 2) * 30], 1)
    scores = torch.rand(60)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i].tolist(), boxes[k].tolist()) <= 0.5 for k in kept):
            kept.append(i)
    detections, indices = nms(boxes, scores, 0.5)
    assert 5 < len(kept) < 50
    assert indices.tolist() == kept
    torch.testing.assert_close(detections, torch.cat([boxes, scores[:, None]], 1)[kept])


def pooled(x, roi, size, scale):
    """RoIAlign of one box in float64: the mean of bilinear samples, one per pixel of the feature map."""
    _, height, width = x.shape
    left, top, right, bottom = [value * scale - 0.5 for value in roi]
    out = torch.zeros(len(x), size, size, dtype=torch.float64)
    step_y, step_x = (bottom - top) / size, (right - left) / size
    count_y, count_x = -int(-step_y // 1), -int(-step_x // 1)
    for i in range(size):
        for j in range(size):
            for a in range(count_y):
                for b in range(count_x):
                    v = top + (i + (a + 0.5) / count_y) * step_y
                    u = left + (j + (b + 0.5) / count_x) * step_x
                    if not (-1 <= v <= height and -1 <= u <= width):
                        continue
                    v, u = max(v, 0), max(u, 0)
                    for q in range(height):
                        for p in range(width):
                            # the last pixel continues beyond the border
                            wy = max(0, 1 - abs(min(v, height - 1) - q))
                            wx = max(0, 1 - abs(min(u, width - 1) - p))
                            out[:, i, j] += wy * wx * x[:, q, p] / (count_y * count_x)
    return out


def test_roi_align_of_mmcv(build):
    """mmcv.ops, with its gradient. One box reaches beyond the feature map."""
    from mmcv.ops import RoIAlign
    torch.manual_seed(0)
    rois = torch.tensor([[0, 3.2, 5.1, 40.7, 30.3], [1, 10, 2, 22.5, 47], [1, 30, 20, 75, 60]])
    x = torch.rand(2, 3, 8, 10, requires_grad=True)
    weight = torch.rand(3, 3, 4, 4)
    y = RoIAlign(4, spatial_scale=1 / 6, sampling_ratio=0)(x, rois)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = torch.stack([pooled(exact[int(r[0])], r[1:].tolist(), 4, 1 / 6) for r in rois])
    (exact_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, exact_gradient.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('detector', ['retinanet', 'cascade_rcnn'])
def test_scripts_of_mmdet(build, tmp_path, detector):
    """tools/train.py starts a config from the weights of the plain model, and tools/test.py evaluates the result."""
    import mmdet
    data = write_rectangles(tmp_path / 'data')
    plain = tmp_path / 'plain.safetensors'
    safetensors.torch.save_file(timm.create_model('resnet18').state_dict(), plain)
    loaders = []
    for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        loaders += [f'{loader}_dataloader.{setting}' for setting in (
            f'dataset.data_root={data}', f'dataset.ann_file={split}.json', f'dataset.data_prefix.img={split}',
            f'dataset.pipeline.{2 if loader == "train" else 1}.scale=(128,128)', 'num_workers=0',
            'dataset.metainfo.classes=red,green,blue', 'persistent_workers=False')]
    options = [
        'model.backbone.model=spa_resnet18', f'model.backbone.pretrained={plain}',
        'model.neck.in_channels=[64,128,256,512]', 'train_cfg.max_epochs=1', *loaders,
        *(['model.test_cfg.rcnn.score_thr=0', *(f'model.roi_head.bbox_head.{i}.num_classes=3' for i in range(3))]
          if detector == 'cascade_rcnn' else ['model.test_cfg.score_thr=0', 'model.bbox_head.num_classes=3']),
        *(f'{split}_evaluator.ann_file={data}/val.json' for split in ('val', 'test'))]
    tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    stand_in = 'import mmcv_ops; '
    code = 'import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'

    def script(name, *arguments, before=''):
        done = subprocess.run(
            [sys.executable, '-c', before + code, tools / name, CONFIGS / f'{detector}_spa_resnet50_2x.py', *arguments,
             '--work-dir', tmp_path / 'run', '--cfg-options', *options],
            capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
        return done.returncode, done.stdout, done.stderr

    train_code, output, error = script('train.py', before=stand_in)
    assert train_code == 0, error
    assert re.search(r'Epoch\(train\) +\[1\]\[4/4\]', output), output
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    plain.unlink()
    test_code, output, error = script('test.py', checkpoint, before=stand_in)
    assert test_code == 0, error
    assert re.search(r'coco/bbox_mAP: \d', output), output
    if importlib.util.find_spec('mmcv._ext').loader is None:  # the stand-in
        failed_code, _, error = script('train.py')
        assert failed_code == 1
        assert 'the compiled operators of mmcv cannot be loaded' in error
