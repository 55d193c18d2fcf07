"""Mutated files are given to the verbs that read them: each must end in a success or a documented error.

The seed of each mutation is the name of the case and the number of the mutation, so that a failure can be repeated. The
message of a failure has this number and the path of the mutated file.
"""
import contextlib
import copy
import csv
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from published import CARDS, NAME, SHIPPED

import timm_spa_cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='peak memory is read from /proc'),
]

MUTATIONS = 143  # of each of the 14 cases: 2,002 files
SECONDS = 1.0  # of one process, in addition to those of the original file
MEMORY = 500 * 2**20  # bytes in addition to those at the start
RUN_FILES = ('args.yaml', 'summary.csv', 'run.json', 'card.yaml')
CASES = [
    *((verb, 'model.safetensors') for verb in ('convert', 'publish', 'verify', 'card')),
    *((verb, 'config.json') for verb in ('verify', 'card')),
    *((verb, name) for name in RUN_FILES for verb in ('publish', 'card')),
]
UNUSUAL = (
    None, True, False, 0, -1, 1, 3, 7, 10**6, 10**30, 2**63, -2**31, 0.5, 1e308, float('inf'), float('nan'), '', ' ',
    'nan', '1e9', '-', 'a' * 20_000, '\x00', '\u202e\ufeff', '../../../etc/passwd', '{{ 7 * 7 }}', '---\nx: 1\n---',
    '| a |', [], {}, [[]], {'': None}, [1, 2], [None] * 3, [1e30] * 3, {'a': {'b': []}}, ['x'] * 300,
    'spa_resnet50', 'gated')
TOKENS = (
    b'', b'null', b'-1', b'1e999', b'nan', b'[]', b'{}', b'""', b'"', b'&a [*a]', b'!!python/name:os.system', b'<<: *a',
    b'\x00', b'\xff\xfe', b'\n', b'\r', b'\t', b':', b'- ', b'99999999999999999999', b'[' * 5000,
    b'{"a":' * 3000, b'%', b'#', b',', b'---', b'\xc2\x85')


def change_bytes(data, rng):
    """Changes bytes, regardless of the format of the file."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 2, 8, 64, 4096)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:to]
        elif kind == 2:
            data[at:at] = data[at:to]
        elif kind == 3:
            data[at:to] = rng.choice(TOKENS)
        elif kind == 4:
            data[at:at] = rng.choice(TOKENS)
        else:
            del data[at:]
    return bytes(data)


def change_value(value, rng):
    """Replaces or deletes random values and names, at any depth."""
    entries = []

    def collect(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            entries.append((container, key))
            if isinstance(container[key], (dict, list)):
                collect(container[key])

    value = copy.deepcopy(value)
    collect(value)
    for _ in range(rng.choice((1, 1, 1, 3))):
        container, key = rng.choice(entries)
        kind = rng.randrange(5)
        with contextlib.suppress(KeyError, IndexError, TypeError):  # removed by an earlier change
            if kind == 0 and isinstance(container, dict):
                container[str(rng.choice(UNUSUAL))[:50]] = container.pop(key)
            elif kind == 1:
                del container[key]
            else:
                container[key] = copy.deepcopy(rng.choice(UNUSUAL))
    return value


def change_json(data, rng):
    return json.dumps(change_value(json.loads(data), rng)).encode()


def change_yaml(data, rng):
    return yaml.safe_dump(change_value(yaml.safe_load(data), rng)).encode()


def change_csv(data, rng):
    out = io.StringIO()
    csv.writer(out).writerows(
        ['' if cell is None else cell for cell in row] if isinstance(row, list) else [row]
        for row in change_value(list(csv.reader(data.decode().splitlines())), rng))
    return out.getvalue().encode()


def change_safetensors(data, rng):
    """Changes the header or the values."""
    size = int.from_bytes(data[:8], 'little')
    header, values = data[8:8 + size], bytearray(data[8 + size:])
    kind = rng.randrange(5)
    if kind < 2:
        header = change_json(header, rng)
    elif kind == 2:
        header = change_bytes(header, rng)
    elif kind == 3:
        for _ in range(rng.choice((1, 100))):
            at = rng.randrange(len(values) - 4)
            values[at:at + 4] = rng.choice((b'\xff' * 4, b'\x00\x7c' * 2, b'\x00\x00\x80\xff', rng.randbytes(4)))
    else:
        return rng.choice((0, 1, size - 1, size + 1, 2**40, 2**63)).to_bytes(8, 'little') + header + values
    return len(header).to_bytes(8, 'little') + header + values


CHANGES = {'.json': change_json, '.yaml': change_yaml, '.csv': change_csv, '.safetensors': change_safetensors}


def mutated(data, name, rng):
    change = CHANGES[Path(name).suffix] if rng.random() < 0.6 else change_bytes
    return change(data, rng)


def status(field):
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(f'{field}:'))


class TooLongError(BaseException):
    """Not caught by handlers of file errors."""


@contextlib.contextmanager
def limited():
    """Limits memory, and the time to one minute."""
    def stop(*_):
        raise TooLongError

    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (status('VmSize') + 4 * MEMORY, before[1]))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(arguments):
    """Runs a verb; returns a description of an invalid outcome or '', the seconds and the bytes that it took."""
    output = io.StringIO()
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts from here
    start, memory = time.process_time(), status('VmRSS')
    failure = ''
    with limited(), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            code = timm_spa_cli.main(list(map(str, arguments)))
            if code not in (0, 1):
                failure = f'exit code {code}'
        except BaseException as e:  # also SystemExit, and exceptions of Rust
            failure = f'{type(e).__name__}: {e}'
    if re.search("allocate|MemoryError", output.getvalue()):  # hidden by the limit of this test otherwise
        failure = 'asked for too much memory'
    if 'This is a bug' in output.getvalue() or 'cannot be used' in output.getvalue():
        failure = output.getvalue().strip().splitlines()[-2]
    return failure[:300], time.process_time() - start, status('VmHWM') - memory


@pytest.fixture
def folder(tmp_path, dry_run):
    """A repository with all files of its run, as input of every verb."""
    shutil.copytree(dry_run, tmp_path / 'original')
    torch.set_num_threads(1)
    return tmp_path / 'original'


def arguments_of(verb, folder, out):
    return {
        'convert': ['convert', folder / 'model.safetensors', out / 'out.safetensors', '--model', NAME.partition('.')[0],
                    '--overwrite'],
        'publish': ['publish', folder / 'model.safetensors', '--model', NAME, '--dry-run', out, '--replace-card'],
        'verify': ['verify', folder],
        'card': ['card', folder],
    }[verb]


@pytest.mark.parametrize(('verb', 'name'), CASES, ids=lambda value: value)
def test_mutated_files(verb, name, folder, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    arguments = arguments_of(verb, folder, out)
    unchanged = [run(arguments) for _ in range(3)]
    assert not unchanged[-1][0]
    seconds = max(s for _, s, _ in unchanged[1:]) + SECONDS
    original = (folder / name).read_bytes()
    failures = []
    for i in range(MUTATIONS):
        data = mutated(original, name, random.Random(f'{verb} {name} {i}'))
        (folder / name).write_bytes(data)
        failure, took, memory = run(arguments)
        if took > seconds:
            failure += f' {took:.1f} seconds'
        if memory > MEMORY:
            failure += f' {memory / 2**20:.0f} MiB'
        if failure:
            path = tmp_path / f'{i}-{name}'
            path.write_bytes(data)
            failures.append(f'mutation {i} ({path}): {failure}')
    assert not failures, f'{len(failures)} of {MUTATIONS}:\n' + '\n'.join(failures[:40])


def test_number_of_mutations_and_files():
    assert MUTATIONS * len(CASES) >= 2000
    assert {name for _, name in CASES} == {*RUN_FILES, 'config.json', SHIPPED.with_name('model.safetensors').name}
    assert all((CARDS / name).exists() for name in (*RUN_FILES, 'config.json'))
