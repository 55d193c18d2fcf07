"""`timm-spa export`: files that other runtimes compute the same with as PyTorch, or no files."""
import copy
import json
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
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
from timm_spa import export as export_module
from timm_spa._errors import UsageError
from timm_spa._shipped import shipped_photographs
from timm_spa.checkpoints.files import WriteError
from timm_spa.export.exporter import FORMATS, ExportError, export
from timm_spa.predict import labelled_batches, load_model, picture_reader
from timm_spa_cli.predict import SHIPPED_MODEL

NETS = {
    'spa_resnet18': {}, 'spa_mobilenetv2_cifar': {}, 'spa_b_resnet18': {}, 'resnet18': {},
    'gated': dict(base='resnet18', neutral=False)}
SMALL = 'spa_mobilenetv2_cifar'
EXACT = 1e-5


@pytest.fixture
def small():
    """A small net with ten classes, quick to export."""
    return make_model('resnet18', num_classes=10, stem_width=16, channels=(8, 16, 24, 32))


@pytest.fixture
def image_folder(tmp_path):
    """The shipped photographs, six to train on and two to test on, in a folder for each class."""
    for i, picture in enumerate(sorted(p for p in (resources.files('timm_spa') / 'images').iterdir()
                                       if p.name.endswith('.jpg'))):
        folder = tmp_path / 'images' / ('test' if i % 4 == 0 else 'train') / picture.name.removesuffix('.jpg')
        folder.mkdir(parents=True)
        shutil.copyfile(str(picture), folder / 'photograph.jpg')
    return tmp_path / 'images'


def run_onnx(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {'image': x.numpy()})[0])


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize('name', slow_unless({'spa_resnet18', 'spa_mobilenetv2_cifar', 'gated'}.__contains__, NETS))
@torch.no_grad()
def test_onnx_at_every_batch_and_size(name, tmp_path):
    """Read by ONNX Runtime alone, at sizes whose maps the cells of the pyramid do not divide."""
    model, side = make_model(name, **NETS[name]), min(image_size(name)[0], 96)
    report = export(model, tmp_path / 'net.onnx', dynamic='size', img_size=side)
    assert report.difference < EXACT
    assert report.shapes == [(1, 3, side + 21, side + 5), (3, 3, side + 10, side + 32), (2, 3, side, side)]
    for shape in ((5, 3, side, side), (1, 3, side // 2, side + 51)):
        x = torch.randn(shape)
        assert rel(run_onnx(report.path, x), model(x)) < EXACT


@pytest.mark.parametrize(('to', 'dynamic'), [
    pytest.param(
        to, dynamic, marks=pytest.mark.slow if to == 'aoti' or to == 'torch-export' and dynamic != 'batch' else ())
    for to in ('onnx', 'torch-export', 'openvino', 'aoti') for dynamic in (None, 'batch', 'size')])
@torch.no_grad()
def test_every_format(to, dynamic, small, tmp_path):
    if to == 'openvino':
        pytest.importorskip('openvino')
    model = timm_spa.add_attention(small, where=['layer1.0', 'layer4.1'], neutral=False)
    path = tmp_path / f'net{FORMATS[to].suffix}'
    report = export(model, path, to, dynamic, img_size=64)
    assert report.difference < EXACT
    assert len({shape[0] for shape in report.shapes}) == (3 if dynamic else 1)
    assert len({shape[2:] for shape in report.shapes}) == (3 if dynamic == 'size' else 1)
    assert names_in(tmp_path) == sorted({path.name, f'{path.name}.json', *(['net.bin'] if to == 'openvino' else [])})
    assert report.size == sum(p.stat().st_size for p in tmp_path.iterdir() if p.suffix != '.json')
    run = FORMATS[to].run(path)
    shape = {None: (1, 3, 64, 64), 'batch': (4, 3, 64, 64), 'size': (4, 3, 85, 71)}[dynamic]
    x = torch.randn(shape)
    assert rel(run(x), model(x)) < EXACT
    if dynamic is None and to != 'aoti':  # which does not check shapes
        with pytest.raises(Exception, match=r'(?i)shape|dimension|size|expected'):
            run(torch.randn(2, 3, 64, 64))
    about = json.loads(path.with_name(f'{path.name}.json').read_text())
    assert about['inputs'] == {'image': {
        None: [1, 3, 64, 64], 'batch': ['batch', 3, 64, 64], 'size': ['batch', 3, 'height', 'width']}[dynamic]}
    if to != 'aoti':  # has the paths of its compiler
        files = [p.read_bytes() for p in tmp_path.iterdir()]
        if to == 'torch-export':
            with zipfile.ZipFile(path) as archive:
                files += [archive.read(name) for name in archive.namelist()]
        for place in (Path(timm_spa.__file__).parent, Path(torch.__file__).parent, Path(__file__).parent, tmp_path):
            assert not any(str(place).encode() in content for content in files)


@torch.no_grad()
def test_metadata_is_enough_to_classify(tmp_path, image_folder):
    """By the numbers in the file alone, the same class as by the model."""
    path = tmp_path / 'lite.onnx'
    model = load_model(SHIPPED_MODEL, fuse=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export(model, path, images=image_folder)
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}['timm_spa']
    assert said == json.loads(path.with_name(f'{path.name}.json').read_text())
    assert said['model'] == SHIPPED_MODEL
    assert (said['form'], said['dtype'], said['format']) == ('fused', 'float32', 'onnx')
    assert said['label_names'] == list(timm.get_pretrained_cfg(SHIPPED_MODEL).label_names)
    assert said['versions'] == dict(timm_spa=timm_spa.__version__, timm=timm.__version__, torch=torch.__version__)
    transform = timm.data.create_transform(**{key: said[key] for key in (
        'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')})
    right = []
    for photograph in sorted((image_folder / 'test').glob('*/*.jpg')):
        scores = run_onnx(path, transform(Image.open(photograph)).unsqueeze(0))
        right.append(said['label_names'][int(scores.argmax())] == photograph.parent.name)
    assert report.pictures == len(right) == 2
    assert report.accuracy == 100 * sum(right) / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_built_has_the_norm_layers_that_fused_has_not(tmp_path):
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
    """Calibrated on other pictures than it is measured on, by channel; the accuracy is that of the file."""
    path = tmp_path / 'lite.onnx'
    arguments = ['export', SHIPPED_MODEL, str(path), '--to', 'onnx', '--int8', '--images', str(image_folder)]
    assert timm_spa_cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "Calibrated on 6 pictures of 'train'." in out
    assert 'on 2 pictures of' in out
    graph = onnx.load(path).graph
    scales = {tensor.name: tensor.dims for tensor in graph.initializer if tensor.name.endswith('_scale')}
    assert any(dims and dims[0] > 1 for dims in scales.values()), 'one scale a channel'
    weights = [t for t in graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    model = load_model(SHIPPED_MODEL)
    right = {'before': 0, 'after': 0}
    for x, target in labelled_batches(model, image_folder, 'test', 1)[0]:
        right['before'] += int(model(x).argmax() == target)
        right['after'] += int(run_onnx(path, x).argmax() == target)
    assert f'top-1 {100 * right["before"] / 2:.2f} %' in out
    assert f'Top-1 {100 * right["after"] / 2:.2f} % on 2' in out
    assert path.stat().st_size < 0.4 * 14.6e6
    assert names_in(tmp_path) == ['images', 'lite.onnx', 'lite.onnx.json']


def test_int8_says_that_it_has_no_other_pictures(tmp_path, image_folder):
    model = make_model('resnet18', num_classes=2, stem_width=16, channels=(8, 16, 24, 32))
    shutil.rmtree(image_folder / 'train')
    report = export(model, tmp_path / 'net.onnx', int8=True, images=image_folder, batch_size=3, img_size=64)
    assert 'as there are no others' in report.notes[0]
    assert report.pictures == 2
    assert report.size < report.size_before
    assert 1e-4 < report.difference < 0.5


@pytest.mark.parametrize(('path', 'options', 'match'), [
    ('net.onnx', dict(to='tflite'), 'one of onnx, torch-export, aoti, openvino'),
    ('net.pt', dict(), r'should end in \.onnx'),
    ('net.onnx', dict(dynamic='width'), 'dynamic must be'),
    ('net.pt2', dict(to='aoti', half=True), 'float16 is written for onnx and openvino only'),
    ('net.xml', dict(to='openvino', int8=True, images='.'), 'int8 is written for onnx only'),
    ('net.onnx', dict(int8=True), 'needs --images'),
    ('net.onnx', dict(int8=True, half=True), 'one of them'),
    ('net.onnx', dict(batch_size=0), 'at least 1'),
    ('net.onnx', dict(img_size=0), 'at least 1')])
def test_arguments_that_make_no_sense(path, options, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        export(nn.Identity(), tmp_path / path, **options)
    assert not names_in(tmp_path)


@pytest.mark.parametrize('taken', ['net.onnx', 'net.onnx.json'])
def test_what_is_there_is_kept(taken, small, tmp_path):
    (tmp_path / taken).write_text('mine')
    with pytest.raises(ExportError, match=f'{taken} is there already; --overwrite'):
        export(small, tmp_path / 'net.onnx', img_size=32)
    assert names_in(tmp_path) == [taken]
    assert (tmp_path / taken).read_text() == 'mine'
    export(small, tmp_path / 'net.onnx', img_size=32, overwrite=True)
    assert names_in(tmp_path) == ['net.onnx', 'net.onnx.json']
    assert (tmp_path / taken).read_bytes() != b'mine'


def test_files_of_several_kinds_in_one_folder(small, tmp_path):
    for name, to in (('net.onnx', 'onnx'), ('net.pt2', 'torch-export')):
        export(small, tmp_path / name, to, img_size=32)
        assert json.loads((tmp_path / f'{name}.json').read_text())['format'] == to


@pytest.mark.parametrize(
    'error', [RuntimeError('no such operator\nand more'), KeyboardInterrupt(), OSError(28, 'full')])
def test_an_exporter_that_fails_leaves_nothing(error, small, tmp_path, monkeypatch):
    def fail(model, args, path, **kwargs):
        Path(path).write_bytes(b'half of it')
        Path(path + '.data').write_bytes(b'and its weights')
        raise error

    (tmp_path / 'net.onnx').write_text('mine')
    monkeypatch.setattr(torch.onnx, 'export', fail)
    expected, match = {
        RuntimeError: (ExportError, r'resnet18\S* cannot be exported to onnx: RuntimeError: no such operator$'),
        KeyboardInterrupt: (KeyboardInterrupt, None), OSError: (WriteError, 'cannot be written: full')}[type(error)]
    with pytest.raises(expected, match=match):
        export(small, tmp_path / 'net.onnx', img_size=32, overwrite=True)
    assert names_in(tmp_path) == ['net.onnx']
    assert (tmp_path / 'net.onnx').read_text() == 'mine'


@pytest.mark.parametrize(('change', 'match'), [
    (lambda y: y + 1e-3 * y.abs().max(), 'differs from PyTorch by 0.001'), (lambda y: y * float('nan'), 'by nan')])
def test_a_file_that_computes_something_else_is_not_kept(change, match, small, tmp_path, monkeypatch):
    run = FORMATS['onnx'].run
    changed = export_module.dataclasses.replace(
        FORMATS['onnx'], run=lambda path: lambda x: change(run(path)(x)))
    monkeypatch.setitem(export_module.FORMATS, 'onnx', changed)
    with pytest.raises(ExportError, match=match):
        export(small, tmp_path / 'net.onnx', img_size=32)
    assert not names_in(tmp_path)


@pytest.mark.parametrize(('to', 'package', 'extra'), [
    ('onnx', 'onnx', 'export'), ('onnx', 'onnxruntime', 'export'), ('openvino', 'openvino', 'openvino')])
def test_a_package_that_is_missing(to, package, extra, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf'{to} needs {package}: pip install "timm_spa\[{extra}\]"'):
        export(small, tmp_path / f'net{FORMATS[to].suffix}', to)
    assert not names_in(tmp_path)


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_needed():
    code = 'import sys, timm_spa.export; print([m for m in ("onnx", "onnxruntime", "openvino") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_command_line(tmp_path, capsys):
    """A checkpoint with classes of its own, whose file names no weights that it is not of."""
    model = make_model(SMALL, num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    (tmp_path / 'classes.txt').write_text('ash\nbeech\nelm\n')
    out = tmp_path / 'net.onnx'
    arguments = ['export', SMALL, str(out), '--to', 'onnx', '--checkpoint', str(tmp_path / 'weights.pth'),
                 '--num-classes', '3', '--dynamic', 'batch']
    assert timm_spa_cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith(f'Wrote {out}: fused, float32, ')
    assert 'Largest difference from PyTorch at 2x3x32x32, 1x3x32x32, 3x3x32x32, 2x3x32x32: ' in said
    about = json.loads((tmp_path / 'net.onnx.json').read_text())
    assert about['label_names'] == about['class_names'] == ['ash', 'beech', 'elm']
    assert about['model'] == SMALL
    assert timm_spa_cli.main(arguments) == 1
    assert 'is there already' in capsys.readouterr().err


def test_an_unknown_model(tmp_path, capsys):
    assert timm_spa_cli.main(['export', 'spa_resnet19', str(tmp_path / 'net.onnx'), '--to', 'onnx']) == 1
    assert "Unknown model 'spa_resnet19'. Did you mean" in capsys.readouterr().err
    assert not names_in(tmp_path)


@torch.no_grad()
def test_a_net_for_grey_pictures(tmp_path):
    model = make_model('resnet18', num_classes=10, stem_width=16, channels=(8, 16, 24, 32), in_chans=1)
    report = export(model, tmp_path / 'net.onnx', img_size=64)
    assert report.shapes == [(1, 1, 64, 64)] * 4
    assert report.difference < EXACT
    about = json.loads((tmp_path / 'net.onnx.json').read_text())
    assert about['mean'] == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_MEAN) / 3])
    assert about['std'] == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_STD) / 3])


@pytest.mark.slow
@pytest.mark.parametrize('name', timm_spa.list_models('spa_*'))
@torch.no_grad()
def test_every_net_with_spa(name, tmp_path):
    """A net as conditioned as trained ones: statistics of photographs in the norm layers, gates that vary moderately.

    With random ones, PyTorch's own float32 outputs of spa_densenet161 are off by 3 % of those in float64. Where that
    error is larger than a millionth, the file may be off by ten times as much.
    """
    model, size = make_model(name).train(), min(image_size(name)[0], 128)
    for key, parameter in model.named_parameters():
        if key.endswith('attn.fc2.weight'):
            parameter.mul_(0.1)
    for module in model.modules():
        if hasattr(module, 'momentum'):
            module.momentum = 1.
    read = picture_reader(model)
    pictures = torch.stack([read(path) for path in shipped_photographs()])
    model(torch.nn.functional.interpolate(pictures, size=(size, size), mode='bilinear', antialias=True))
    model.eval()
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    if name == 'spa_vgg16_bn':  # timm's head pools maps of less than 7x7, which the exporter refuses at a free size
        with pytest.raises(ExportError, match='adaptive_avg_pool2d, input size not accessible'):
            export(model, tmp_path / 'net.onnx', dynamic='size', img_size=size)
        reports = [
            export(model, tmp_path / f'{side}.onnx', dynamic='batch', img_size=side) for side in (224, 256, 288)]
    else:
        reports = [export(model, tmp_path / 'net.onnx', dynamic='size', img_size=size)]
    assert len({shape[2:] for report in reports for shape in report.shapes}) == 3
    model._forward_pre_hooks.clear()
    exact = copy.deepcopy(model).double()

    def error(x):
        expected = exact(x.double())
        return ((model(x) - expected).abs().max() / expected.abs().max()).item()

    own = max(error(x) for x in seen if x.any())  # not the exporter's example
    assert max(report.difference for report in reports) < max(EXACT, 10 * own)


@pytest.fixture
def fake_format(monkeypatch):
    """A kind of file that is the network itself, with a change of its outputs: quick, and wrong where a test says."""
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

        fake = export_module.dataclasses.replace(
            FORMATS['torch-export'], write=write, run=run, dtypes=('float32', 'float16'))
        monkeypatch.setitem(export_module.FORMATS, 'torch-export', fake)
        return calls

    return install


def one_value(y, share):
    """Changes a single value of the last image by a share of the largest output."""
    y = y.clone()
    y[-1, -1] += share * y.abs().max()
    return y


@pytest.mark.parametrize('dynamic', [None, 'batch', 'size'])
def test_every_input_is_compared(dynamic, small, tmp_path, fake_format):
    """One wrong value of one image in one of the inputs is enough, also at the last size."""
    calls = fake_format(lambda number, y: y)
    count = len(export(small, tmp_path / 'net.pt2', 'torch-export', dynamic, img_size=64).shapes)
    assert len(calls) == count == (3 if dynamic == 'size' else 4)
    for wrong in range(count):
        calls = fake_format(lambda number, y, wrong=wrong: one_value(y, 3e-4) if number == wrong else y)
        with pytest.raises(ExportError, match=r'differs from PyTorch by 0\.0003') as e:
            export(small, tmp_path / 'wrong.pt2', 'torch-export', dynamic, img_size=64)
        assert str(tuple(calls[wrong].shape)) in str(e.value)
    assert names_in(tmp_path) == ['net.pt2', 'net.pt2.json']


@pytest.mark.parametrize(('half', 'allowed', 'refused'), [(False, 5e-5, 2e-4), (True, 5e-3, 2e-2)])
def test_the_difference_is_the_largest_and_relative(half, allowed, refused, small, tmp_path, fake_format):
    """Also where all outputs are negative, large or small."""
    for scale in (-1e-3, 1., -1e3):
        torch.nn.init.zeros_(small.fc.weight)
        small.fc.bias.data = scale * torch.linspace(1, 2, 10)
        fake_format(lambda number, y: one_value(y, allowed if number == 1 else allowed / 5))
        report = export(small, tmp_path / 'net.pt2', 'torch-export', half=half, img_size=64, overwrite=True)
        assert report.difference == pytest.approx(allowed, rel=1e-2)
        fake_format(lambda number, y: one_value(y, refused))
        with pytest.raises(ExportError, match='It was not kept'):
            export(small, tmp_path / 'no.pt2', 'torch-export', half=half, img_size=64)


def test_the_photographs_are_compared(small, tmp_path, fake_format):
    """The last input of the model's own size, as `predict` prepares it."""
    calls = fake_format(lambda number, y: y)
    export(small, tmp_path / 'net.pt2', 'torch-export', 'batch')
    expected = torch.stack([picture_reader(small)(path) for path in shipped_photographs()[:2]])
    assert torch.equal(calls[-1], expected)
    assert len({tuple(x.shape) for x in calls}) == 3
    assert all(0.1 < x.std() < 3 for x in calls), 'no constant input'


def test_accuracy_counts_every_image_once(tmp_path, fake_format):
    """A last batch that is filled up does not count twice."""
    for i, name in enumerate(('a', 'b')):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for number in range(3 if i else 2):
            Image.new('RGB', (32, 32), (80 * i, 60 * number, 90)).save(tmp_path / 'images' / name / f'{number}.png')
    model = make_model('resnet18', num_classes=2, stem_width=16, channels=(8, 16, 24, 32))
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([0., 1.])  # says b of all
    fake_format(lambda number, y: y)
    report = export(
        model, tmp_path / 'net.pt2', 'torch-export', images=tmp_path / 'images', batch_size=2, img_size=32)
    assert (report.accuracy, report.pictures) == (60., 5)


def test_models_without_classes(small, tmp_path, fake_format):
    fake_format(lambda number, y: y)
    with pytest.raises(ExportError, match='FeatureListNet is not a classifier of timm: .* without features_only'):
        export(timm.create_model('resnet18', features_only=True), tmp_path / 'net.pt2', 'torch-export')
    with pytest.raises(ExportError, match='Identity is not a classifier of timm'):
        export(nn.Identity(), tmp_path / 'net.pt2', 'torch-export')
    small.reset_classifier(0)  # gives features, which any runtime can compute
    export(small, tmp_path / 'net.pt2', 'torch-export', img_size=64)
    assert json.loads((tmp_path / 'net.pt2.json').read_text())['label_names'] == []


@pytest.mark.parametrize('options', [
    dict(batch_size='2'), dict(batch_size=1.5), dict(batch_size=True), dict(img_size='64'), dict(img_size=-1)])
def test_numbers_that_are_none(options, small, tmp_path):
    with pytest.raises(UsageError, match='must be whole numbers of at least 1'):
        export(small, tmp_path / 'net.onnx', **options)
