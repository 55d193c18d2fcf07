"""Export to runtimes for phones and boards: each converter is optional, and its files compute the same as PyTorch."""
import json

import pytest
import timm
import torch
from test_one_form import make_model

import timm_spa
import timm_spa_cli
from timm_spa.export import ExportError, export
from timm_spa.export.exporter import FORMATS

TARGETS = ('litert', 'ncnn', 'executorch')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_tf_efficientnet_lite0', 'attached'])
@pytest.mark.parametrize('to', TARGETS)
@torch.no_grad()
def test_files_compute_the_same(to, name, tmp_path):
    """`export` compares the file with PyTorch at its only size; the gates of the last one are attached."""
    for package in FORMATS[to].packages:
        pytest.importorskip(package)
    if name == 'attached':
        model = timm_spa.add_attention(make_model('resnet18'), where=['layer1.0', 'layer4.1'], neutral=False)
    else:
        model = make_model(name)
    path = tmp_path / f'model{FORMATS[to].suffix}'
    # 192: feature maps whose sides the pyramid sizes do not divide
    size = 192 if name == 'attached' else 224
    report = export(model, path, to, img_size=size)
    print(to, name, report.difference, report.size)
    assert report.difference < 1e-5
    assert report.shapes == [(1, 3, size, size)] * 4
    about = json.loads(path.with_name(f'{path.name}.json').read_text())
    assert (about['format'], about['inputs']) == (to, {'image': [1, 3, size, size]})
    assert {p.name for p in tmp_path.iterdir()} == {
        path.name, f'{path.name}.json', *(path.with_suffix(suffix).name for suffix in FORMATS[to].companions)}


def test_ncnn_refuses_batches(tmp_path):
    for package in FORMATS['ncnn'].packages:
        pytest.importorskip(package)
    with pytest.raises(ExportError, match='ncnn computes one image at a time, got batch_size=2'):
        export(make_model('spa_resnet18'), tmp_path / 'model.param', 'ncnn', batch_size=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('half', [False, True])
@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_tf_efficientnet_lite0'])
def test_coreml_converts(name, half, tmp_path, capsys):
    """Core ML runs on macOS only, so the report states that the file was not compared."""
    pytest.importorskip('coremltools')
    path, weights = tmp_path / 'out' / 'model.mlpackage', tmp_path / 'weights.pth'
    path.parent.mkdir()
    torch.save(make_model(name).state_dict(), weights)
    arguments = [
        'export', name, str(path), '--to', 'coreml', '--checkpoint', str(weights), *(['--half'] if half else [])]
    assert timm_spa_cli.main(arguments) == 0
    assert 'Not compared with PyTorch: files for coreml cannot be run here.' in capsys.readouterr().out
    size = sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
    parameters = sum(p.numel() for p in timm.create_model(name).parameters())
    assert 0.9 < size / parameters / (2 if half else 4) < 1.1
    assert {p.name for p in path.parent.iterdir()} == {'model.mlpackage', 'model.mlpackage.json'}
    with pytest.raises(ExportError, match='the folder exists already. Remove it'):
        export(make_model(name), path, 'coreml', overwrite=True)
