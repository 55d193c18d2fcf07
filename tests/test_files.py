"""Files and folders are there as a whole or not at all."""
import pytest

from timm_spa._files import WriteError, replacing


def write_and_fail(path, write):
    with replacing(path) as partial:
        write(partial)
        raise KeyError(path)


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('before')
    with replacing(path) as partial:
        partial.write_text('after')
        assert path.read_text() == 'before'
    assert path.read_text() == 'after'
    with pytest.raises(KeyError):
        write_and_fail(path, lambda partial: partial.write_text('never'))
    assert path.read_text() == 'after'
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_a_folder_is_made_or_added_to(tmp_path):
    for content in ('first', 'second'):
        with replacing(tmp_path / 'new' / 'folder') as partial:
            partial.mkdir(parents=True)
            (partial / f'{content}.txt').write_text(content)
            (partial / 'both.txt').write_text(content)
    assert {p.name: p.read_text() for p in (tmp_path / 'new' / 'folder').iterdir()} == {
        'first.txt': 'first', 'second.txt': 'second', 'both.txt': 'second'}
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / 'new' / 'other', lambda partial: partial.mkdir())
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['folder']


def test_what_cannot_be_written_is_named(tmp_path, disk_of):
    with pytest.raises(WriteError, match='missing/a.txt cannot be written: No such file'), \
            replacing(tmp_path / 'missing' / 'a.txt') as partial:
        partial.write_text('x')
    import safetensors.torch
    import torch
    with disk_of(1000), pytest.raises(WriteError, match='w.safetensors cannot be written'), \
            replacing(tmp_path / 'w.safetensors') as partial:
        safetensors.torch.save_file({'x': torch.zeros(10000)}, partial)
    assert list(tmp_path.iterdir()) == []
