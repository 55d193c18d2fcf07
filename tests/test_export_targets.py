"""Export to runtimes for phones and boards: each converter is optional, and its files compute the same as PyTorch."""
import json

import pytest
import torch
from test_one_form import make_model

import timm_spa
from timm_spa.export import export
from timm_spa.export.exporter import FORMATS

TARGETS = ('litert',)


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
    report = export(model, path, to)
    print(to, name, report.difference, report.size)
    assert report.difference < 1e-5
    assert report.shapes == [(1, 3, 224, 224)] * 4
    about = json.loads(path.with_name(f'{path.name}.json').read_text())
    assert (about['format'], about['inputs']) == (to, {'image': [1, 3, 224, 224]})
    assert {p.name for p in tmp_path.iterdir()} == {
        path.name, f'{path.name}.json', *(path.with_suffix(suffix).name for suffix in FORMATS[to].companions)}
