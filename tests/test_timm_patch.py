"""The patch for timm: it applies, and timm with it builds the same networks as this package."""
import difflib
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import timm_spa  # noqa: F401

MADE_FOR = '1.0.31'  # the newest release when the patch was last tried; `make timm-patch` tries it on the newest one
ROOT = Path(__file__).parent.parent
COMPARED = ['spa_resnet18', 'spa_mobilenetv2_050']
# in a process of its own, with the patched timm: the names and shapes of all models, and outputs and gradients of some
CHILD = '''
import json, sys
import safetensors.torch, timm, torch
names, compared, folder = json.loads(sys.argv[1])
shapes = {}
for name in names:
    model = timm.create_model(name, device='meta')
    shapes[name] = {k: list(v.shape) for k, v in model.state_dict().items()}
for name in compared:
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.0).double()
    model.load_state_dict(safetensors.torch.load_file(f'{folder}/{name}.safetensors'), strict=True)
    x = safetensors.torch.load_file(f'{folder}/x.safetensors')['x']
    out = {'eval': model.eval()(x)}
    (model.train()(x) ** 2).sum().backward()
    out.update({f'grad.{k}': v.grad for k, v in model.named_parameters()})
    safetensors.torch.save_file(out, f'{folder}/{name}.out.safetensors')
print(json.dumps([timm.__file__, 'timm_spa' in sys.modules, shapes]))
'''


@pytest.fixture(scope='module')
def timm_patch():
    spec = importlib.util.spec_from_file_location('timm_patch', ROOT / 'docs' / 'upstream' / 'timm_patch.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['timm_patch'] = module
    spec.loader.exec_module(module)
    return module


def text_of_timm(timm_patch, path):
    """The text of one of timm's files; of one that a wheel does not have, the lines that the patch looks for."""
    file = Path(timm.__file__).parent.parent / path
    if path.startswith('timm/'):
        return file.read_text() if file.exists() else ''
    return ''.join(edit.anchor for edit in timm_patch.edits() if edit.path == path)


@pytest.fixture(scope='module')
def changed_files(timm_patch):
    """The new text of every file that the patch changes."""
    if timm.__version__ != MADE_FOR:
        pytest.skip(f'the patch is made for timm {MADE_FOR}, this is {timm.__version__}')
    return timm_patch.patched_files(functools.partial(text_of_timm, timm_patch))


@pytest.fixture(scope='module')
def patched(changed_files, tmp_path_factory):
    """A copy of the installed timm with the patch."""
    folder = tmp_path_factory.mktemp('patched')
    shutil.copytree(Path(timm.__file__).parent, folder / 'timm', ignore=shutil.ignore_patterns('__pycache__'))
    for path, text in changed_files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def theirs(name, key):
    """The name in timm of a parameter of ours: timm's ResNet calls whatever is in its attention slot 'se'."""
    return key.replace('.attn.', '.se.') if 'resnet' in name else key


@pytest.mark.slow
def test_patched_timm_builds_the_same_networks(timm_patch, patched, tmp_path):
    torch.manual_seed(0)
    models, x = {}, torch.randn(2, 3, 64, 48, dtype=torch.float64)
    safetensors.torch.save_file({'x': x}, tmp_path / 'x.safetensors')
    for name in COMPARED:
        models[name] = model = timm.create_model(name, num_classes=7, zero_init_last=False) \
            if 'resnet' in name else timm.create_model(name, num_classes=7)
        model.double()  # timm's layer has the equations alone, which round otherwise than this package's formulas
        torch.nn.init.normal_(model.get_parameter(next(
            k for k, _ in model.named_parameters() if k.endswith('pyramid_weight'))))
        safetensors.torch.save_file(
            {theirs(name, k): v for k, v in model.state_dict().items()}, tmp_path / f'{name}.safetensors')
    done = subprocess.run(
        [sys.executable, '-c', CHILD, json.dumps([timm_patch.NAMES, COMPARED, str(tmp_path)])], capture_output=True,
        text=True, env=dict(os.environ, PYTHONPATH=str(patched)))
    assert done.returncode == 0, done.stderr
    file, has_ours, shapes = json.loads(done.stdout)
    assert Path(file).is_relative_to(patched)
    assert not has_ours
    for name in timm_patch.NAMES:
        ours = timm.create_model(name, device='meta').state_dict()
        assert {theirs(name, k): list(v.shape) for k, v in ours.items()} == shapes[name]
    for name, model in models.items():
        out = safetensors.torch.load_file(tmp_path / f'{name}.out.safetensors')
        torch.testing.assert_close(model.eval()(x), out['eval'], msg=name)
        (model.train()(x) ** 2).sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, out[f'grad.{theirs(name, key)}'], msg=f'{name}: {key}')


def test_a_patch_can_be_read_in_ten_minutes(timm_patch, changed_files):
    """`make timm-patch` counts the whole patch; here its headers and the context of README and tests are missing."""
    lines = [line for path, text in changed_files.items() for line in difflib.unified_diff(
        text_of_timm(timm_patch, path).splitlines(), text.splitlines())]
    assert 400 < len(lines) < timm_patch.LIMIT - 47


def test_a_changed_timm_is_named(timm_patch):
    with pytest.raises(timm_patch.PatchError, match="timm/layers/__init__.py has 0 times 'from .space_to_depth"):
        timm_patch.patched_files(lambda path: '')


def test_text_has_the_figures_of_the_pages(timm_patch):
    text = timm_patch.pull_request()
    pages = ' '.join(
        (ROOT / page).read_text() for page in ('README.md', 'train_scripts/results/README.md',
                                               'tests/benchmarks/speed.md'))
    assert '{' not in text
    rows = [row for row in text.splitlines() if row.startswith('| ') and re.search(r'\d\.\d\d', row)]
    assert len(rows) > 15
    assert all(version in pages for version in re.findall(r'torch \d+\.\d+\.\d+', text))
    costs = timm.create_model('spa_resnet50', device='meta')
    assert f'| `spa_resnet50` | {sum(p.numel() for p in costs.parameters()):,} | 4.21 |' in text
    for row in rows:
        for number in re.findall(r'\d+\.\d+', row):
            assert number in pages or row.startswith('| `spa_') and row.count('|') == 4, row


def test_formatter_is_held_to_added_lines_only(timm_patch):
    old, new = 'a = 1.\nb = 2\n', 'a = 1.\nb = 2\nc = 3.\n'
    assert timm_patch.misformatted(old, new, 'a = 1.0\nb = 2\nc = 3.0\n') == ['c = 3.']
    assert timm_patch.misformatted(old, new, 'a = 1.0\nb = 2\nc = 3.\n') == []
