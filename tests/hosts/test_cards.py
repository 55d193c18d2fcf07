"""Every Python block of every card runs as it stands: beside the files of its repository, and from a Hub."""
import re
import shutil

import pytest
import timm
import torch
from hub_server import OWNER
from published import SHIPPED
from test_hub_cards import CARDS, weights_of

from timm_spa.hub.publish import publish
from timm_spa.predict import sample_image

pytestmark = pytest.mark.slow


def run_blocks(card, folder, monkeypatch):
    """Runs the blocks of a card in a folder, and returns the names of each."""
    shutil.copy(sample_image('chelsea'), folder / 'image.jpg')
    monkeypatch.chdir(folder)
    values = []
    for block in re.findall(r'^```python\n(.*?)^```', card, re.M | re.S):
        values.append({})
        exec(block, values[-1])
    assert len(values) == 4, 'classes, feature maps, an embedding, transformers'
    return values


def check_answers(by_timm, by_transformers, cfg):
    """transformers answers what timm does, with names for people, and trains in float32."""
    names = [(cfg.label_descriptions or {}).get(name, name) for name in cfg.label_names]
    expected = [(names[i], p) for i, p in zip(
        by_timm['classes'][0].tolist(), by_timm['probabilities'][0].tolist(), strict=True)]
    answers = [(answer['label'], answer['score']) for answer in by_transformers['answers']]
    assert [name for name, _ in answers] == [name for name, _ in expected]
    assert [p for _, p in answers] == pytest.approx([p for _, p in expected], abs=1e-5)
    assert {p.dtype for p in by_transformers['model'].parameters()} == {torch.float32}


@pytest.mark.parametrize('card', CARDS, ids=lambda path: path.name)
def test_in_a_folder_of_the_repository(card, tmp_path, monkeypatch):
    shutil.copytree(card, tmp_path / 'repository')
    shutil.copy(weights_of(card), tmp_path / 'repository' / 'model.safetensors')
    values = run_blocks((card / 'README.md').read_text(), tmp_path / 'repository', monkeypatch)
    check_answers(values[0], values[-1], timm.get_pretrained_cfg(card.name))


def test_from_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', OWNER)
    publish(SHIPPED, SHIPPED.stem, 'org/name')
    repository = hub.repositories['org/name']
    card = repository.commits[hub.head('org/name')]['README.md'].content.decode()
    values = run_blocks(card, tmp_path, monkeypatch)
    check_answers(values[0], values[-1], timm.get_pretrained_cfg(SHIPPED.stem))
    assert any('GET /org/name/resolve/main/config.json' in request for request in hub.requests)
