"""The weights that come with the package. What their card says of them is held in test_card.py."""
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_spa  # noqa: F401

ROOT = Path(__file__).parent.parent
SHIPPED = [name for name in timm.list_pretrained('spa_*') if timm.get_pretrained_cfg(name).file]
CARDS = sorted((ROOT / 'hub_cards').iterdir())


def test_there_is_a_card_for_each_and_no_card_without_weights():
    assert SHIPPED == ['spa_mobilenetv2_cifar.tmm_tin200']
    assert [c.name for c in CARDS] == SHIPPED


@pytest.mark.parametrize('name', SHIPPED)
def test_loads_without_any_network(name, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError('a socket was opened')

    monkeypatch.setattr(socket, 'socket', no_network)
    model = timm.create_model(name.partition('.')[0], pretrained=True).eval()
    assert model.num_classes == 200
    assert all(v.isfinite().all() for v in model.state_dict().values())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 200)


@pytest.mark.parametrize('name', SHIPPED)
def test_labels(name):
    cfg = timm.get_pretrained_cfg(name)
    assert len(cfg.label_names) == cfg.num_classes == 200
    assert list(cfg.label_names) == sorted(cfg.label_names), 'the order of an image folder'
    assert set(cfg.label_descriptions) == set(cfg.label_names)
    assert cfg.label_descriptions['n07920052'] == 'espresso'
    imagenet = timm.data.ImageNetInfo()
    known = set(imagenet.label_names())
    assert set(cfg.label_names) <= known


@pytest.mark.skipif(
    not os.environ.get('TIN200') or not os.environ.get('TIMM_SCRIPTS'),
    reason="needs Tiny-ImageNet-200 at 32x32 (TIN200=folder) and timm's scripts (TIMM_SCRIPTS=checkout)")
@pytest.mark.parametrize('name', SHIPPED)
def test_timms_validate_prints_the_accuracy_of_the_card(name):
    done = subprocess.run(
        [sys.executable, '-m', 'timm_spa.run', 'validate', '--data-dir', os.environ['TIN200'], '--split', 'validation',
         '--model', name, '--pretrained', '--device', 'cpu', '--workers', '1'],
        check=True, capture_output=True, text=True)
    top1, top5 = re.search(r'Acc@1 ([\d.]+) .*Acc@5 ([\d.]+) ', done.stdout + done.stderr).groups()
    front_matter = yaml.safe_load((ROOT / 'hub_cards' / name / 'README.md').read_text().split('---\n')[1])
    metrics = {m['name']: m['value'] for m in front_matter['model-index'][0]['results'][0]['metrics']}
    assert float(top1) == pytest.approx(metrics['Top-1 accuracy'], abs=0.005)
    assert float(top5) == pytest.approx(metrics['Top-5 accuracy'], abs=0.005)
