"""Files and folders are there as a whole or not at all."""
import contextlib
import os
import stat
import threading

import pytest

from timm_spa.checkpoints import files as _files
from timm_spa.checkpoints.files import WriteError, finish_interrupted, interrupted, replacing
from timm_spa.checkpoints.own_files import is_own_figure, png_mark, refuse_replacing


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
    with pytest.raises(WriteError, match='pipe cannot be written: it is not a regular file'), \
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


EARLIER = {'config.json': 'earlier', 'mine.txt': 'mine', 'weights': 'earlier'}
LATER = {'config.json': 'later', 'mine.txt': 'mine', 'new.csv': 'later', 'weights': 'later'}
RESULTS = '.results/a.yaml'  # in a subfolder


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def replace_files(folder):
    with replacing(folder) as partial:
        partial.mkdir()
        for name, text in LATER.items():
            if name != 'mine.txt':
                (partial / name).write_text(text)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, text in EARLIER.items():
        (folder / name).write_text(text)
    return folder


def stop_at(step, stop, monkeypatch):
    """Calls `stop` in place of the change of the file system with this number; returns a counter of the changes."""
    count = [0]

    def counted(change):
        def changed(*args, **kwargs):
            count[0] += 1
            if count[0] == step:
                stop()
            return change(*args, **kwargs)
        return changed

    for name in ('mkdir', 'rename', 'replace', 'rmdir', 'unlink'):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return count


STEPS = 8  # changes until the last new file is there: two folders made, two files moved out, one renaming, three files


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()], ids=['full', 'Ctrl-C'])
@pytest.mark.parametrize('step', range(1, STEPS + 1))
def test_an_error_at_any_step_leaves_the_earlier_files(folder, step, error, monkeypatch):
    def stop():
        raise error

    with monkeypatch.context() as patch:
        stop_at(step, stop, patch)
        with pytest.raises((WriteError, KeyboardInterrupt)):
            replace_files(folder)
    assert contents(folder) == EARLIER


@pytest.mark.parametrize('step', range(STEPS + 1, STEPS + 5))
def test_an_error_afterwards_leaves_the_new_files(folder, step, monkeypatch):
    """The earlier files that cannot be removed are removed by the next call."""
    def stop():
        raise OSError(5, 'Input/output error')

    with monkeypatch.context() as patch:
        stop_at(step, stop, patch)
        replace_files(folder)
    finish_interrupted(folder)
    assert contents(folder) == LATER


@pytest.mark.parametrize('again', [finish_interrupted, replace_files], ids=['finish', 'replace'])
@pytest.mark.parametrize('step', range(1, STEPS + 5))
def test_a_process_killed_at_any_step_leaves_no_mixture(folder, step, again, monkeypatch):
    process = os.fork()
    if process == 0:
        stop_at(step, lambda: os._exit(9), monkeypatch)
        replace_files(folder)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    left = {name: text for name, text in ((p.name, p.read_text()) for p in folder.iterdir() if p.is_file())}
    assert left.pop('mine.txt') == 'mine'
    assert len(set(left.values())) <= 1, 'earlier and later files side by side'
    assert interrupted(folder) or len(left) in (2, 3), 'what is missing can be found'
    again(folder)
    now = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
    assert now in (EARLIER, LATER) if again is finish_interrupted else now == LATER
    assert not interrupted(folder)


def replace_nested(folder):
    with replacing(folder) as partial:
        for name in ('config.json', 'new.csv', RESULTS):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text('later')


@pytest.mark.parametrize('exists', [False, True])
@pytest.mark.parametrize('step', range(1, 16))
def test_files_in_subfolders(folder, step, exists, monkeypatch):
    """They are replaced with the others; an error at any step, or a killed process, leaves no mixture of them."""
    earlier = {**EARLIER, **({RESULTS: 'earlier', '.results/mine.yaml': 'mine'} if exists else {})}
    later = {**earlier, 'config.json': 'later', 'new.csv': 'later', RESULTS: 'later'}
    for name, text in earlier.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    def files():
        names = (str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())
        return {name: (folder / name).read_text() for name in names if not name.startswith(_files.STAGING)}

    def stop():
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, contextlib.suppress(WriteError):
        stop_at(step, stop, patch)
        replace_nested(folder)
    finish_interrupted(folder)
    assert files() in (earlier, later)
    assert exists or files() == later or not (folder / '.results').exists()
    process = os.fork()
    if process == 0:
        stop_at(step, lambda: os._exit(9), monkeypatch)
        replace_nested(folder)
        os._exit(0)
    os.waitpid(process, 0)
    replace_nested(folder)
    assert files() == later
    assert not interrupted(folder)


def test_what_cannot_be_restored_is_named(folder, monkeypatch):
    """A folder that becomes read-only in the middle; the next call restores the files."""
    rename = os.rename

    def only_once(source, target):
        if str(target).endswith('config.json') and _files.OLD in str(target):
            return rename(source, target)
        raise OSError(30, 'Read-only file system')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', only_once)
        patch.setattr(os, 'replace', only_once)
        with pytest.raises(WriteError, match=r'its earlier files are in .*\.old. Run the same command again'):
            replace_files(folder)
    assert (interrupted(folder)[0] / 'config.json').read_text() == 'earlier'
    finish_interrupted(folder)
    assert contents(folder) == EARLIER


def test_the_folder_stays_the_same_one(folder, monkeypatch):
    """A shell in it, or a mount, would otherwise be left in a folder that is gone."""
    inode = folder.stat().st_ino
    monkeypatch.chdir(folder)
    (folder.parent / 'link').symlink_to('folder')
    for name in ('.', '../link', folder):
        replace_files(name)
        assert folder.stat().st_ino == inode
        assert contents(folder) == LATER
        assert os.getcwd() == str(folder)
    assert sorted(os.listdir(folder.parent)) == ['folder', 'link']


def test_several_at_a_time_do_not_mix(folder):
    """Files of several writers, exchanged at the same moment, are all of one of them."""
    errors = []
    start = threading.Barrier(4)

    def write(text):
        try:
            for _ in range(10):
                with replacing(folder) as partial:
                    partial.mkdir()
                    for i in range(20):
                        (partial / f'{i}.txt').write_text(text)
                    start.wait(30)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(text,)) for text in 'abcd']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({(folder / f'{i}.txt').read_text() for i in range(20)}) == 1
    assert len(os.listdir(folder)) == 23


def test_files_of_others_are_not_replaced(tmp_path):
    path = tmp_path / 'a.txt'
    refuse_replacing([path])
    path.touch()
    refuse_replacing([path, tmp_path, '/dev/null'])
    path.write_text('mine')
    refuse_replacing([path], overwrite=True)
    refuse_replacing([path], is_own=lambda path: path.read_text() == 'mine')
    for is_own in (None, lambda path: False):
        with pytest.raises(WriteError, match=r'a.txt exists already. Add --overwrite to replace it'):
            refuse_replacing([tmp_path / 'none', path], **(dict(is_own=is_own) if is_own else {}))


def test_figures_say_who_drew_them(tmp_path):
    from PIL import Image

    for name, info in (('own.png', png_mark()), ('other.png', None)):
        Image.new('RGB', (4, 4)).save(tmp_path / name, pnginfo=info)
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    (tmp_path / 'other.svg').write_text('<svg><text>timm_spa</text></svg>')
    assert [p.name for p in sorted(tmp_path.iterdir()) if is_own_figure(p)] == ['own.png']
