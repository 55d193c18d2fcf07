"""What an export compares and reports."""
import copy
import dataclasses
import json

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from test_export import EXACT, names_in, one_value
from test_models import image_size
from test_one_form import make_model

import timm_spa
from timm_spa._errors import UsageError
from timm_spa.export import ExportError, export
from timm_spa.export.exporter import FORMATS
from timm_spa.predict import image_reader, sample_images


@pytest.fixture
def fake_format(monkeypatch):
    """A format that runs the model itself, with changed outputs: quick, and wrong where a test wants it."""
    def install(change):
        written, calls = [], []

        def write(model, path, example, axes, half):
            written.append(model)
            path.write_bytes(b'a file')

        def run(path):
            def compute(x):
                calls.append(x)
                with torch.no_grad():
                    return change(len(calls) - 1, written[-1](x))

            return compute

        fake = dataclasses.replace(
            FORMATS['torch-export'], write=write, run=run, dtypes=('float32', 'float16'))
        monkeypatch.setitem(FORMATS, 'torch-export', fake)
        return calls

    return install


@pytest.mark.parametrize('dynamic', [None, 'batch', 'size'])
def test_every_input_is_compared(dynamic, small_net, tmp_path, fake_format):
    """One wrong value of one image in one of the inputs is enough, also at the last size."""
    calls = fake_format(lambda number, y: y)
    count = len(export(small_net, tmp_path / 'model.pt2', 'torch-export', dynamic, img_size=64).shapes)
    assert len(calls) == count == (3 if dynamic == 'size' else 4)
    for wrong in range(count):
        calls = fake_format(lambda number, y, wrong=wrong: one_value(y, 3e-4) if number == wrong else y)
        with pytest.raises(ExportError, match=r'differs from PyTorch by 0\.0003') as e:
            export(small_net, tmp_path / 'wrong.pt2', 'torch-export', dynamic, img_size=64)
        assert str(tuple(calls[wrong].shape)) in str(e.value)
    assert names_in(tmp_path) == ['model.pt2', 'model.pt2.json']


@pytest.mark.parametrize(('half', 'allowed', 'refused'), [(False, 5e-5, 2e-4), (True, 5e-3, 2e-2)])
def test_the_difference_is_the_maximum_and_relative(half, allowed, refused, small_net, tmp_path, fake_format):
    """The difference is relative to the largest absolute output, also if all outputs are negative, large or small."""
    for scale in (-1e-3, 1., -1e3):
        torch.nn.init.zeros_(small_net.fc.weight)
        small_net.fc.bias.data = scale * torch.linspace(1, 2, 10)
        fake_format(lambda number, y: one_value(y, allowed if number == 1 else allowed / 5))
        report = export(small_net, tmp_path / 'model.pt2', 'torch-export', half=half, img_size=64, overwrite=True)
        assert report.difference == pytest.approx(allowed, rel=1e-2)
        fake_format(lambda number, y: one_value(y, refused))
        with pytest.raises(ExportError, match='The file was not kept'):
            export(small_net, tmp_path / 'no.pt2', 'torch-export', half=half, img_size=64)


def test_smooth_images_are_compared(small_net, tmp_path, fake_format):
    """The last input resembles images: neighbouring pixels are similar, and the regions differ."""
    calls = fake_format(lambda number, y: y)
    export(small_net, tmp_path / 'model.pt2', 'torch-export', 'batch')
    (rough, smooth), regions = ((x[..., 1:] - x[..., :-1]).abs().max() for x in calls[-2:]), calls[-1].unfold(2, 56, 56)
    assert smooth < 0.05 * rough
    assert regions.mean((3, 4)).std(2).min() > 0.1
    assert len({tuple(x.shape) for x in calls}) == 3
    assert all(0.1 < x.std() < 3 for x in calls), 'inputs are not constant'


def test_accuracy_counts_every_image_once(tmp_path, fake_format):
    """The padding of the last batch is not counted."""
    for i, name in enumerate(('a', 'b')):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for number in range(3 if i else 2):
            Image.new('RGB', (32, 32), (80 * i, 60 * number, 90)).save(tmp_path / 'images' / name / f'{number}.png')
    model = make_model('resnet18', num_classes=2, stem_width=16, channels=(8, 16, 24, 32))
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([0., 1.])  # predicts b for all images
    fake_format(lambda number, y: y)
    report = export(
        model, tmp_path / 'model.pt2', 'torch-export', images=tmp_path / 'images', batch_size=2, img_size=32)
    assert (report.accuracy, report.pictures) == (60., 5)


def test_models_without_classes(small_net, tmp_path, fake_format):
    fake_format(lambda number, y: y)
    with pytest.raises(ExportError, match='FeatureListNet is not a classifier of timm: .* without features_only'):
        export(timm.create_model('resnet18', features_only=True), tmp_path / 'model.pt2', 'torch-export')
    with pytest.raises(ExportError, match='Identity is not a classifier of timm'):
        export(nn.Identity(), tmp_path / 'model.pt2', 'torch-export')
    small_net.reset_classifier(0)  # returns features, which any runtime can compute
    export(small_net, tmp_path / 'model.pt2', 'torch-export', img_size=64)
    assert json.loads((tmp_path / 'model.pt2.json').read_text())['label_names'] == []


@pytest.mark.parametrize('options', [
    dict(batch_size='2'), dict(batch_size=1.5), dict(batch_size=True), dict(img_size='64'), dict(img_size=-1)])
def test_invalid_numbers(options, small_net, tmp_path):
    with pytest.raises(UsageError, match='must be whole numbers of at least 1'):
        export(small_net, tmp_path / 'model.onnx', **options)


@pytest.mark.slow
@pytest.mark.parametrize('name', timm_spa.list_models('spa_*'))
@torch.no_grad()
def test_every_model_with_spa(name, tmp_path):
    """The model resembles a trained model: norm statistics come from photographs, and gates vary moderately.

    With random statistics, the float32 outputs of spa_densenet161 in PyTorch differ by 3 % from float64. Models with
    such a float32 error above 1e-6 may have ten times that error in the exported file.
    """
    model, size = make_model(name).train(), min(image_size(name)[0], 128)
    for key, parameter in model.named_parameters():
        if key.endswith('attn.fc2.weight'):
            parameter.mul_(0.1)
    for module in model.modules():
        if hasattr(module, 'momentum'):
            module.momentum = 1.
    read = image_reader(model)
    images = torch.stack([read(path) for path in sample_images()])
    model(torch.nn.functional.interpolate(images, size=(size, size), mode='bilinear', antialias=True))
    model.eval()
    inputs = []
    model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    if name == 'spa_vgg16_bn':  # timm's head pools feature maps below 7x7: the exporter needs a fixed size
        with pytest.raises(ExportError, match='adaptive_avg_pool2d, input size not accessible'):
            export(model, tmp_path / 'model.onnx', dynamic='size', img_size=size)
        reports = [
            export(model, tmp_path / f'{side}.onnx', dynamic='batch', img_size=side) for side in (224, 256, 288)]
    else:
        reports = [export(model, tmp_path / 'model.onnx', dynamic='size', img_size=size)]
    assert len({shape[2:] for report in reports for shape in report.shapes}) == 3
    model._forward_pre_hooks.clear()
    exact = copy.deepcopy(model).double()

    def error(x):
        expected = exact(x.double())
        return ((model(x) - expected).abs().max() / expected.abs().max()).item()

    own = max(error(x) for x in inputs if x.any())  # without the exporter's example of zeros
    assert max(report.difference for report in reports) < max(EXACT, 10 * own)
