"""`timm-spa export`: exported files compute the same as PyTorch, and other files are not kept."""
import collections
import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from marks import slow_unless
from PIL import Image
from test_models import image_size
from test_one_form import make_model, rel

import timm_spa
import timm_spa_cli
from timm_spa._errors import UsageError
from timm_spa.checkpoints.files import WriteError
from timm_spa.export import ExportError, export
from timm_spa.export.exporter import FORMATS
from timm_spa.predict import labelled_batches, load_model, sample_image
from timm_spa_cli._options import SHIPPED_MODEL

MODELS = {
    'spa_resnet18': {}, 'spa_mobilenetv2_cifar': {}, 'spa_b_resnet18': {}, 'resnet18': {},
    'gated': dict(base='resnet18', neutral=False)}
SMALL = 'spa_mobilenetv2_cifar'
LABELS = dict(
    astronaut='Plum', chelsea='Kiwi', coffee='Beef-Tomato', coins='Anjou', motorcycle_left='Pineapple', rocket='Orange')
EXACT = 1e-5


@pytest.fixture
def image_folder(tmp_path):
    """Photographs in folders of the shipped model's labels: four for training, two for testing, one of them right."""
    for name, label in LABELS.items():
        folder = tmp_path / 'images' / ('test' if name in ('astronaut', 'coffee') else 'train') / label
        folder.mkdir(parents=True)
        shutil.copyfile(sample_image(name), folder / f'{name}.png')
    return tmp_path / 'images'


def run_onnx(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {'image': x.numpy()})[0])


def one_value(y, share):
    """Changes a single value of the last image by a share of the largest output."""
    y = y.clone()
    y[-1, -1] += share * y.abs().max()
    return y


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.quick(1)
@pytest.mark.parametrize('name', slow_unless({'spa_resnet18', 'spa_mobilenetv2_cifar', 'gated'}.__contains__, MODELS))
@torch.no_grad()
def test_onnx_at_every_batch_and_size(name, tmp_path):
    """ONNX Runtime computes the same, also at sizes that the pyramid sizes do not divide."""
    model, side = make_model(name, **MODELS[name]), min(image_size(name)[0], 96)
    report = export(model, tmp_path / 'model.onnx', dynamic='size', img_size=side)
    assert report.difference < EXACT
    assert report.shapes == [(1, 3, side + 21, side + 5), (3, 3, side + 10, side + 32), (2, 3, side, side)]
    for shape in ((5, 3, side, side), (1, 3, side // 2, side + 51)):
        x = torch.randn(shape)
        assert rel(run_onnx(report.path, x), model(x)) < EXACT


@pytest.mark.quick(4)
@pytest.mark.parametrize(('to', 'dynamic'), [
    pytest.param(
        to, dynamic, marks=pytest.mark.slow if to == 'aoti' or to == 'torch-export' and dynamic != 'batch' else ())
    for to in ('onnx', 'torch-export', 'openvino', 'aoti') for dynamic in (None, 'batch', 'size')])
@torch.no_grad()
def test_every_format(to, dynamic, small_net, tmp_path):
    if to == 'openvino':
        pytest.importorskip('openvino')
    model = timm_spa.add_attention(small_net, where=['layer1.0', 'layer4.1'], neutral=False)
    path = tmp_path / f'model{FORMATS[to].suffix}'
    report = export(model, path, to, dynamic, img_size=64)
    assert report.difference < EXACT
    assert len({shape[0] for shape in report.shapes}) == (3 if dynamic else 1)
    assert len({shape[2:] for shape in report.shapes}) == (3 if dynamic == 'size' else 1)
    assert names_in(tmp_path) == sorted({path.name, f'{path.name}.json', *(['model.bin'] if to == 'openvino' else [])})
    assert report.size == sum(p.stat().st_size for p in tmp_path.iterdir() if p.suffix != '.json')
    run = FORMATS[to].run(path)
    shape = {None: (1, 3, 64, 64), 'batch': (4, 3, 64, 64), 'size': (4, 3, 85, 71)}[dynamic]
    x = torch.randn(shape)
    assert rel(run(x), model(x)) < EXACT
    if dynamic is None and to != 'aoti':  # AOTInductor does not check shapes
        with pytest.raises(Exception, match=r'(?i)shape|dimension|size|expected'):
            run(torch.randn(2, 3, 64, 64))
    about = json.loads(path.with_name(f'{path.name}.json').read_text())
    assert about['inputs'] == {'image': {
        None: [1, 3, 64, 64], 'batch': ['batch', 3, 64, 64], 'size': ['batch', 3, 'height', 'width']}[dynamic]}
    if to != 'aoti':  # AOTInductor writes the paths of its compiler
        files = [p.read_bytes() for p in tmp_path.iterdir()]
        if to == 'torch-export':
            with zipfile.ZipFile(path) as archive:
                files += [archive.read(name) for name in archive.namelist()]
        for folder in (Path(timm_spa.__file__).parent, Path(torch.__file__).parent, Path(__file__).parent, tmp_path):
            assert not any(str(folder).encode() in content for content in files)


@torch.no_grad()
def test_metadata_is_sufficient_to_classify(tmp_path, image_folder):
    """The metadata of the file are sufficient to prepare images and to name their classes."""
    path = tmp_path / 'lite.onnx'
    model = load_model(SHIPPED_MODEL, fuse=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export(model, path, images=image_folder)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}['timm_spa']
    assert metadata == json.loads(path.with_name(f'{path.name}.json').read_text())
    assert metadata['model'] == SHIPPED_MODEL
    assert (metadata['form'], metadata['dtype'], metadata['format']) == ('fused', 'float32', 'onnx')
    assert (metadata['input_layout'], metadata['color_order'], metadata['output']) == ('NCHW', 'RGB', 'logits')
    assert metadata['pixel_range'] == [0, 1]  # before mean and std
    assert metadata['label_names'] == list(timm.get_pretrained_cfg(SHIPPED_MODEL).label_names)
    assert metadata['versions'] == dict(timm_spa=timm_spa.__version__, timm=timm.__version__, torch=torch.__version__)
    transform = timm.data.create_transform(**{key: metadata[key] for key in (
        'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')})
    correct = []
    for photograph in sorted((image_folder / 'test').glob('*/*.png')):
        scores = run_onnx(path, transform(Image.open(photograph).convert('RGB')).unsqueeze(0))
        correct.append(metadata['label_names'][int(scores.argmax())] == photograph.parent.name)
    assert report.pictures == len(correct) == 2
    assert report.accuracy == 100 * sum(correct) / 2 == 50
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_the_fused_form_has_fewer_norm_layers(tmp_path):
    counts = {}
    for fuse in (True, False):
        path = tmp_path / f'{fuse}.pt2'
        model = make_model('spa_resnet18', layers=(1, 1, 1, 1), channels=(8, 16, 24, 32))
        export(model, path, 'torch-export', fuse=fuse, img_size=64)
        nodes = torch.export.load(path).graph.nodes
        counts[fuse] = sum('batch_norm' in str(node.target) for node in nodes)
        assert json.loads(path.with_name(f'{path.name}.json').read_text())['form'] == ('fused' if fuse else 'built')
    assert counts[True] < counts[False] / 2


@pytest.mark.slow
@torch.no_grad()
def test_half(tmp_path):
    model = make_model(SMALL)
    whole, half = (export(model, tmp_path / f'{half}.onnx', half=half) for half in (False, True))
    assert half.size < 0.7 * whole.size
    assert EXACT < half.difference < 1e-2
    assert half.dtype == 'float16'
    types = {tensor.data_type for tensor in onnx.load(half.path).graph.initializer if len(tensor.dims) == 4}
    assert types == {onnx.TensorProto.FLOAT16}
    assert run_onnx(half.path, torch.randn(1, 3, 32, 32)).dtype == torch.float32
    pytest.importorskip('openvino')
    whole, half = (export(model, tmp_path / f'{half}-ov.xml', 'openvino', half=half) for half in (False, True))
    assert half.size < 0.7 * whole.size
    assert 0 < half.difference < 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_int8(tmp_path, image_folder, capsys):
    """Weights are quantized per channel, calibrated on the folder `train`, and the accuracy is measured on the file."""
    path = tmp_path / 'lite.onnx'
    arguments = ['export', SHIPPED_MODEL, str(path), '--to', 'onnx', '--int8', '--images', str(image_folder)]
    assert timm_spa_cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "Calibrated on 4 images of 'train'." in out
    assert 'on 2 images of' in out
    graph = onnx.load(path).graph
    scales = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name.endswith('_scale')}
    assert any(dims and dims[0] > 1 for dims in scales.values()), 'one scale per channel'
    weights = [t for t in graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    model = load_model(SHIPPED_MODEL)
    correct = {'before': 0, 'after': 0}
    for x, target in labelled_batches(model, image_folder, 'test', 1)[0]:
        correct['before'] += int(model(x).argmax() == target)
        correct['after'] += int(run_onnx(path, x).argmax() == target)
    assert f'top-1 {100 * correct["before"] / 2:.2f} %' in out
    assert f'Top-1 {100 * correct["after"] / 2:.2f} % on 2' in out
    assert path.stat().st_size < 0.4 * 14.6e6
    assert names_in(tmp_path) == ['images', 'lite.onnx', 'lite.onnx.json']


@pytest.mark.slow
@torch.no_grad()
def test_openvino_int8(tmp_path, image_folder, capsys):
    """The feature maps of every convolution are quantized, and the report tells the default precision apart."""
    openvino = pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    path = tmp_path / 'lite.xml'
    arguments = [
        'export', SHIPPED_MODEL, str(path), '--to', 'openvino', '--int8', '--images', str(image_folder), '--dynamic',
        'batch']
    assert timm_spa_cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "Calibrated on 4 images of 'train'." in out
    assert 'Statistics collection' not in out + err
    assert f', int8, {(path.stat().st_size + path.with_suffix(".bin").stat().st_size) / 1e6:.1f} MB.' in out
    assert path.with_suffix('.bin').stat().st_size < 0.4 * 14.6e6
    assert names_in(tmp_path) == ['images', 'lite.bin', 'lite.xml', 'lite.xml.json']
    nodes = openvino.Core().read_model(path).get_ops()
    types = collections.Counter(node.get_type_name() for node in nodes)
    assert types['FakeQuantize'] > types['Convolution'] + types['GroupConvolution'] > 50
    model = load_model(SHIPPED_MODEL)
    correct = {'before': 0, 'after': 0}
    run = FORMATS['openvino'].run(path)
    for x, target in labelled_batches(model, image_folder, 'test', 1)[0]:
        correct['before'] += int(model(x).argmax() == target)
        correct['after'] += int(run(x).argmax() == target)
    assert f'top-1 {100 * correct["before"] / 2:.2f} %' in out
    assert f'Top-1 {100 * correct["after"] / 2:.2f} % on 2' in out
    lower = openvino.Core().get_property('CPU', 'INFERENCE_PRECISION_HINT') != openvino.Type.f32
    assert ('on this processor by default: largest difference' in out) == lower
    about = json.loads((tmp_path / 'lite.xml.json').read_text())
    assert (about['dtype'], about['runtime_options']) == ('int8', {'INFERENCE_PRECISION_HINT': 'f32'})


@torch.no_grad()
def test_the_default_precision_of_a_runtime_is_reported(small_net, tmp_path, image_folder, monkeypatch):
    """It is compared with PyTorch and measured, but no limit applies; the limit holds for the precision of the file."""
    small_net.reset_classifier(2)
    wrong = lambda path: ('bfloat16', lambda x: one_value(small_net(x), 0.5).roll(1, 1))
    for run_at_default, expected in ((wrong, 'bfloat16'), (lambda path: ('float32', small_net), None)):
        fake = dataclasses.replace(
            FORMATS['torch-export'], write=lambda model, path, *_: path.write_bytes(b'a file'),
            run=lambda path: small_net, run_at_default=run_at_default)
        monkeypatch.setitem(FORMATS, 'torch-export', fake)
        report = export(small_net, tmp_path / 'a.pt2', 'torch-export', images=image_folder, img_size=64, overwrite=True)
        assert report.default_dtype == expected
        assert report.difference < 1e-6
        if expected:
            assert report.default_difference > 1e-2
            assert report.default_accuracy == 100 - report.accuracy  # of two classes, the other one
        else:
            assert report.default_difference is report.default_accuracy is None


def test_int8_needs_nncf(small_net, tmp_path, image_folder, monkeypatch):
    pytest.importorskip('openvino')
    monkeypatch.setitem(sys.modules, 'nncf', None)
    with pytest.raises(ExportError, match=r'int8 for openvino needs nncf: pip install "timm_spa\[int8\]"'):
        export(small_net, tmp_path / 'model.xml', 'openvino', int8=True, images=image_folder)


def test_int8_calibrated_on_the_measured_images(tmp_path, image_folder):
    model = make_model('resnet18', num_classes=2, stem_width=16, channels=(8, 16, 24, 32))
    shutil.rmtree(image_folder / 'train')
    report = export(model, tmp_path / 'model.onnx', int8=True, images=image_folder, batch_size=3, img_size=64)
    assert report.notes == ["Calibrated on 2 images of 'test', the split that accuracy is measured on."]
    assert report.pictures == 2
    assert report.size < report.size_before
    assert 1e-4 < report.difference < 0.6


@pytest.mark.parametrize(('path', 'options', 'match'), [
    ('model.onnx', dict(to='tflite'), 'one of onnx, torch-export, aoti, openvino, litert, ncnn, executorch, coreml'),
    ('model.pt', dict(), r'must end in \.onnx'),
    ('model.onnx', dict(dynamic='width'), 'dynamic must be'),
    ('model.pt2', dict(to='aoti', half=True), 'aoti does not support float16. Use onnx or openvino or coreml'),
    ('model.tflite', dict(to='litert', int8=True, images='.'), 'litert does not support int8. Use onnx or openvino'),
    ('model.tflite', dict(to='litert', dynamic='batch'), 'litert does not support dynamic=.batch.*Use onnx or'),
    ('model.mlpackage', dict(to='coreml', images='.'), 'coreml cannot be measured here. Omit --images'),
    ('model.onnx', dict(int8=True), 'needs --images'),
    ('model.onnx', dict(int8=True, half=True), 'cannot be combined'),
    ('model.onnx', dict(batch_size=0), 'at least 1'),
    ('model.onnx', dict(img_size=0), 'at least 1')])
def test_invalid_arguments(path, options, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        export(nn.Identity(), tmp_path / path, **options)
    assert not names_in(tmp_path)


@pytest.mark.parametrize('taken', ['model.onnx', 'model.onnx.json'])
def test_existing_files_are_kept(taken, small_net, tmp_path):
    (tmp_path / taken).write_text('mine')
    message = f'{taken} cannot be written: the file exists already. Replace it with --overwrite'
    with pytest.raises(ExportError, match=message):
        export(small_net, tmp_path / 'model.onnx', img_size=32)
    assert names_in(tmp_path) == [taken]
    assert (tmp_path / taken).read_text() == 'mine'
    export(small_net, tmp_path / 'model.onnx', img_size=32, overwrite=True)
    assert names_in(tmp_path) == ['model.onnx', 'model.onnx.json']
    assert (tmp_path / taken).read_bytes() != b'mine'


def test_several_formats_in_one_folder(small_net, tmp_path):
    for name, to in (('model.onnx', 'onnx'), ('model.pt2', 'torch-export')):
        export(small_net, tmp_path / name, to, img_size=32)
        assert json.loads((tmp_path / f'{name}.json').read_text())['format'] == to


@pytest.mark.parametrize(
    'error', [RuntimeError('no such operator\nand more'), KeyboardInterrupt(), OSError(28, 'full')])
def test_an_exporter_that_fails_leaves_nothing(error, small_net, tmp_path, monkeypatch):
    def fail(model, args, path, **kwargs):
        Path(path).write_bytes(b'a part of the file')
        Path(path + '.data').write_bytes(b'weights')
        raise error

    (tmp_path / 'model.onnx').write_text('mine')
    monkeypatch.setattr(torch.onnx, 'export', fail)
    expected, match = {
        RuntimeError: (ExportError, r'resnet18\S* cannot be exported to onnx: RuntimeError: no such operator$'),
        KeyboardInterrupt: (KeyboardInterrupt, None), OSError: (WriteError, 'cannot be written: full')}[type(error)]
    with pytest.raises(expected, match=match):
        export(small_net, tmp_path / 'model.onnx', img_size=32, overwrite=True)
    assert names_in(tmp_path) == ['model.onnx']
    assert (tmp_path / 'model.onnx').read_text() == 'mine'


@pytest.mark.parametrize(('change', 'match'), [
    (lambda y: y + 1e-3 * y.abs().max(), 'differs from PyTorch by 0.001'), (lambda y: y * float('nan'), 'by nan')])
def test_a_file_with_other_outputs_is_not_kept(change, match, small_net, tmp_path, monkeypatch):
    run = FORMATS['onnx'].run
    changed = dataclasses.replace(
        FORMATS['onnx'], run=lambda path: lambda x: change(run(path)(x)))
    monkeypatch.setitem(FORMATS, 'onnx', changed)
    with pytest.raises(ExportError, match=match):
        export(small_net, tmp_path / 'model.onnx', img_size=32)
    assert not names_in(tmp_path)


@pytest.mark.parametrize(('to', 'package', 'extra'), [
    ('onnx', 'onnx', 'export'), ('onnx', 'onnxruntime', 'export'), ('openvino', 'openvino', 'openvino')])
def test_a_missing_package(to, package, extra, small_net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf'{to} needs {package}: pip install "timm_spa\[{extra}\]"'):
        export(small_net, tmp_path / f'model{FORMATS[to].suffix}', to)
    assert not names_in(tmp_path)


@pytest.mark.slow
def test_runtimes_are_imported_only_when_needed():
    code = 'import sys, timm_spa.export; print([m for m in ("onnx", "onnxruntime", "openvino") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_command_line(tmp_path, capsys):
    """A checkpoint with its own classes is not described as published weights."""
    model = make_model(SMALL, num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    (tmp_path / 'classes.txt').write_text('ash\nbeech\nelm\n')
    out = tmp_path / 'model.onnx'
    arguments = ['export', SMALL, str(out), '--to', 'onnx', '--checkpoint', str(tmp_path / 'weights.pth'),
                 '--num-classes', '3', '--dynamic', 'batch']
    assert timm_spa_cli.main(arguments) == 0
    out_text = capsys.readouterr().out
    assert out_text.startswith(f'Wrote {out}: fused, float32, ')
    assert 'Largest difference from PyTorch at 2x3x32x32, 1x3x32x32, 3x3x32x32, 2x3x32x32: ' in out_text
    about = json.loads((tmp_path / 'model.onnx.json').read_text())
    assert about['label_names'] == about['class_names'] == ['ash', 'beech', 'elm']
    assert about['model'] == SMALL
    assert timm_spa_cli.main(arguments) == 1
    assert 'the file exists already' in capsys.readouterr().err


def test_an_unknown_model(tmp_path, capsys):
    assert timm_spa_cli.main(['export', 'spa_resnet19', str(tmp_path / 'model.onnx'), '--to', 'onnx']) == 1
    assert "Unknown model 'spa_resnet19'. Did you mean" in capsys.readouterr().err
    assert not names_in(tmp_path)


@torch.no_grad()
def test_a_model_for_grey_images(tmp_path):
    model = make_model('resnet18', num_classes=10, stem_width=16, channels=(8, 16, 24, 32), in_chans=1)
    report = export(model, tmp_path / 'model.onnx', img_size=64)
    assert report.shapes == [(1, 1, 64, 64)] * 4
    assert report.difference < EXACT
    about = json.loads((tmp_path / 'model.onnx.json').read_text())
    assert about['mean'] == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_MEAN) / 3])
    assert about['std'] == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_STD) / 3])
