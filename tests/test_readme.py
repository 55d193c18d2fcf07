"""The Python code of the README runs as it stands."""
import re
from pathlib import Path

import pytest
import timm
import torch

README = Path(__file__).parent.parent / 'README.md'
BLOCKS = re.findall(r'^```python\n(.*?)^```', README.read_text(encoding='utf-8'), re.M | re.S)


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_block(number, monkeypatch, capsys):
    """Weights of the Hub are left out: random ones are as good to run it."""
    create = timm.create_model

    def without_hub(name, pretrained=False, **kwargs):
        cfg = timm.get_pretrained_cfg(name)
        return create(name, pretrained=pretrained and bool(cfg.file), **kwargs)

    monkeypatch.setattr(timm, 'create_model', without_hub)
    exec(BLOCKS[number], {'timm': timm, 'torch': torch})
    if 'add_attention' in BLOCKS[number]:
        assert re.match(r'tensor\(0\.', capsys.readouterr().out)
