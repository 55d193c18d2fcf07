"""The weights that come with the package. What their card says of them is held in test_hub_cards.py."""
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
from PIL import Image

import timm_spa
from timm_spa.predict import sample_images

ROOT = Path(__file__).parent.parent
SHIPPED = [name for name in timm.list_pretrained('spa_*') if timm.get_pretrained_cfg(name).file]
CARDS = sorted(path.parent for path in (ROOT / 'hub_cards').glob('*/config.json'))
SIZES = {'spa_mobilenetv2_cifar.tmm_tin200': (32, 200), 'spa_tf_efficientnet_lite0.grocery81': (224, 81)}


def test_there_is_a_card_for_each_and_no_card_without_weights():
    assert list(SIZES) == SHIPPED
    assert [c.name for c in CARDS] == SHIPPED


@pytest.mark.parametrize('name', SHIPPED)
def test_loads_without_any_network(name, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError('a socket was opened')

    monkeypatch.setattr(socket, 'socket', no_network)
    model = timm.create_model(name, pretrained=True).eval()
    size, num_classes = SIZES[name]
    assert model.num_classes == num_classes
    assert all(v.isfinite().all() for v in model.state_dict().values())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, num_classes)


@pytest.mark.parametrize('name', SHIPPED)
def test_attention_has_learned(name):
    """Gates depend on what they see, those of a warm start are 1/2 everywhere."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    pictures = sample_images()
    spread = {}

    def keep(n):
        return lambda module, args, out: spread.update({n: (out.amax((0, 2, 3)) - out.amin((0, 2, 3))).max().item()})

    for n, m in model.named_modules():
        if isinstance(m, timm_spa.SpatialPyramidAttention):
            m.gate.register_forward_hook(keep(n))
    with torch.no_grad():
        model(torch.stack([transform(Image.open(picture).convert('RGB')) for picture in pictures]))
    constant = [n for n, value in spread.items() if value < 0.02]
    assert len(constant) <= len(spread) // 3, constant
    assert max(spread.values()) > 0.2


@pytest.mark.parametrize('name', SHIPPED)
def test_labels(name):
    cfg = timm.get_pretrained_cfg(name)
    assert len(cfg.label_names) == cfg.num_classes
    assert list(cfg.label_names) == sorted(cfg.label_names), 'the order of an image folder'


def test_labels_of_imagenet():
    cfg = timm.get_pretrained_cfg('spa_mobilenetv2_cifar.tmm_tin200')
    assert set(cfg.label_descriptions) == set(cfg.label_names)
    assert cfg.label_descriptions['n07920052'] == 'espresso'
    assert set(cfg.label_names) <= set(timm.data.ImageNetInfo().label_names())


@pytest.mark.parametrize('name', SHIPPED)
def test_timms_validate_prints_the_accuracy_of_the_card(name, request):
    """TIN200 and GROCERY name the folders of the data, which the package does not have."""
    facts = yaml.safe_load((ROOT / 'hub_cards' / name / 'card.yaml').read_text())['accuracy']
    command = facts['command'].split()
    data = command[command.index('--data-dir') + 1]
    if data not in os.environ:
        pytest.skip(f'needs the data of the card ({data}=folder)')
    request.getfixturevalue('timm_scripts')
    done = subprocess.run(
        [sys.executable, *(word.replace(data, os.environ[data]) for word in command[1:]), '--workers', '1'],
        check=True, capture_output=True, text=True)
    top1, top5 = re.search(r'Acc@1 ([\d.]+) .*Acc@5 ([\d.]+) ', done.stdout + done.stderr).groups()
    assert float(top1) == pytest.approx(facts['top1'], abs=0.006)
    assert float(top5) == pytest.approx(facts['top5'], abs=0.006)
