"""Weight files are written with the same bytes for the same content, and read for what they are."""
import functools
import json

import pytest
import safetensors
import safetensors.torch
import torch

from timm_spa.checkpoints import reading as module
from timm_spa.checkpoints.reading import CheckpointError, check_shapes, read_weights, value_problems, write_tensors

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


def test_an_empty_entry_is_not_the_weights(tmp_path):
    torch.save(dict(state_dict_ema={}, state_dict=dict(a=torch.ones(1))), tmp_path / 'w.pth')
    assert read_weights(tmp_path / 'w.pth').used == 'state_dict'
    torch.save({}, tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match=r'none.pth does not contain weights: it is readable but empty'):
        read_weights(tmp_path / 'none.pth')


def test_arguments_of_a_model_are_those_of_a_published_file_only(tmp_path):
    """A training checkpoint may have anything under the same name."""
    torch.save(dict(state_dict=dict(a=torch.ones(1)), model_args='anything'), tmp_path / 'w.pth')
    assert read_weights(tmp_path / 'w.pth').model_args is None
    write_tensors(tmp_path / 'w.safetensors', dict(a=torch.ones(1)), dict(model='a', model_args='{"x": 1}', epoch='7'))
    assert read_weights(tmp_path / 'w.safetensors').model_args == dict(x=1)
    assert read_weights(tmp_path / 'w.safetensors').epoch == 7
    for metadata in (dict(model='a', model_args='[1]'), dict(model_args='{"x": 1}'), dict(model='a', epoch='1' * 10)):
        write_tensors(tmp_path / 'w.safetensors', dict(a=torch.ones(1)), metadata)
        weights = read_weights(tmp_path / 'w.safetensors')
        assert (weights.model_args, weights.epoch) == (None, None)


@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan')])
def test_values_that_no_weights_have(value):
    bad = torch.tensor([0., value])
    (problem,) = value_problems({'a': torch.ones(2), 'b': bad})
    assert problem.startswith('1 tensors with values that are not finite: b')
    (problem,) = value_problems({'a.running_var': torch.tensor([0., -1e-9]), 'a.running_mean': torch.tensor([-1.])})
    assert problem.startswith('1 negative variances: a.running_var')
    assert value_problems({'a.running_var': torch.zeros(2), 'n': torch.tensor(-1)}) == []


@pytest.mark.parametrize('classes', [2, 4])
def test_fewer_and_more_classes_are_named(classes):
    model = torch.nn.Sequential()
    model.head = torch.nn.Linear(5, 3)
    model.pretrained_cfg = dict(classifier='head')
    with pytest.raises(CheckpointError, match=rf'w.pth has {classes} classes \(head.weight\), but the model has 3'):
        check_shapes(torch.nn.Linear(5, classes).state_dict(prefix='head.'), model, 'w.pth')


def test_a_file_has_the_mode_of_others(tmp_path):
    write_tensors(tmp_path / 'w.safetensors', TENSORS, {})
    (tmp_path / 'other').touch()
    assert (tmp_path / 'w.safetensors').stat().st_mode == (tmp_path / 'other').stat().st_mode


@pytest.mark.parametrize('size', [1, 7])
def test_a_file_that_ends_before_its_header(tmp_path, size):
    (tmp_path / 'w.safetensors').write_bytes(b'1' * size)
    with pytest.raises(CheckpointError, match=f'a truncated safetensors file, {8 - size} bytes are missing'):
        read_weights(tmp_path / 'w.safetensors')


@pytest.mark.parametrize('missing', [1, 100, 3000])
def test_a_truncated_file_names_the_number_of_missing_bytes(missing, tmp_path):
    path = tmp_path / 'w.safetensors'
    safetensors.torch.save_file({'a': torch.ones(1000), 'b': torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(CheckpointError, match=f'it is a truncated safetensors file, {missing} bytes are missing'):
        read_weights(path)


def test_tensors_of_eight_bits_are_named(tmp_path):
    torch.save({'a': torch.ones(3), 'b.weight': torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match='w.pth has unsupported tensors: b.weight. They are'):
        read_weights(tmp_path / 'w.pth')


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match='it is a folder. Give the path of the file in it'):
        read_weights(tmp_path)
