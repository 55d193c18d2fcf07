"""Files and folders are there as a whole or not at all."""
import os
import stat
import threading

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


def test_what_is_no_regular_file_stays(tmp_path):
    """A pipe, or a device such as /dev/null, would be gone; a link leads to what is replaced."""
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(WriteError, match='pipe cannot be written: it is no regular file'), \
            replacing(tmp_path / 'pipe') as partial:
        partial.write_text('x')
    assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)
    (tmp_path / 'link').symlink_to('target')
    with replacing(tmp_path / 'link') as partial:
        partial.write_text('x')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'target').read_text() == 'x'


def test_a_folder_of_a_files_name_stops_all(tmp_path):
    (tmp_path / 'out' / 'z.txt').mkdir(parents=True)

    def write(partial):
        partial.mkdir()
        for name in ('a.txt', 'z.txt'):
            (partial / name).write_text('x')

    with pytest.raises(WriteError, match=r'z.txt cannot be written: it is a folder'), \
            replacing(tmp_path / 'out') as partial:
        write(partial)
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['z.txt']


def test_two_at_a_time(tmp_path):
    """One of them is there in the end, as a whole."""
    barrier, errors = threading.Barrier(2), []

    def write(name):
        try:
            with replacing(tmp_path / 'out') as partial:
                partial.mkdir()
                barrier.wait(10)
                (partial / 'file.txt').write_text(name)
                barrier.wait(10)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(name,)) for name in 'ab']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / 'out' / 'file.txt').read_text() in 'ab'
