"""Weight files are written with the same bytes for the same content, and read for what they are."""
import functools
import json

import pytest
import safetensors
import safetensors.torch
import torch

from timm_spa.hub import checkpoint as module
from timm_spa.hub.checkpoint import write_tensors

TENSORS = {'a': torch.arange(5.), 'b': torch.full((3, 2), 7.), 'ä"\n': torch.ones(1, dtype=torch.int64)}


def read(path):
    with safetensors.safe_open(path, framework='pt') as f:
        return f.metadata(), safetensors.torch.load_file(path)


@pytest.mark.parametrize('escaped', [False, True])
def test_a_header_of_any_length(tmp_path, monkeypatch, escaped):
    """Metadata is sorted in place if the header keeps its length, else the whole file is written again."""
    if escaped:  # longer than what safetensors wrote
        longer = functools.partial(json.dumps)
        monkeypatch.setattr(module.json, 'dumps', lambda value, **kwargs: longer(value, indent=4))
    metadata = {'z': 'ä' * 100_000, 'format': 'pt', 'odd': '\x00\x7f\u2028/\\"' + '\U0001f600', 'empty': ''}
    written = []
    for _ in range(5):
        write_tensors(tmp_path / 'w.safetensors', TENSORS, metadata)
        written.append((tmp_path / 'w.safetensors').read_bytes())
        facts, tensors = read(tmp_path / 'w.safetensors')
        assert facts == metadata
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert len(set(written)) == 1
    assert int.from_bytes(written[0][:8], 'little') % 8 == 0, 'tensors are aligned'
