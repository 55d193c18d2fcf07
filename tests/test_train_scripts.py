"""The recipes and launch configurations, and the preparation of data."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_dataset, create_transform

import timm_spa  # noqa: F401

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / 'train_scripts' / 'recipes').glob('*.yaml'))
OPTIONS = json.loads((ROOT / 'tests' / 'timm_options' / 'train-1.0.28.json').read_text())['options']
SCRIPT = ROOT / 'train_scripts' / 'prepare_data.py'


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.name)
def test_recipe_keys_and_values_are_options_of_timms_script(path):
    """timm's script ignores a key that it does not know, in silence."""
    recipe = yaml.safe_load(path.read_text())
    for key, value in recipe.items():
        assert key in OPTIONS, f'{path.name}: {key} is no option of train.py'
        option = OPTIONS[key]
        if option['choices'] is not None:
            assert value in option['choices']
        types = dict(int=int, float=(int, float), str=str).get(option['type'])
        if types is not None:
            for item in value if isinstance(value, list) else [value]:
                assert isinstance(item, types), f'{path.name}: {key} is {item!r}'
    assert path.read_text().startswith('#'), 'a header says what, from where, and how to run it'


@pytest.mark.parametrize('path', sorted((ROOT / 'train_scripts' / 'accelerate').glob('*.yaml')), ids=lambda p: p.name)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == {'cpu': 1, 'gpu1': 1, 'gpu8': 8}[path.stem]
    assert f'--config_file train_scripts/accelerate/{path.name}' in path.read_text()


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for label in ('a', 'b'):
        (tmp_path / 'train' / label).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'train' / label / f'{i}.png')
    return tmp_path


def prepare(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def test_padding_makes_the_exact_random_crop(pictures):
    """timm's training transform of the recipe draws exactly the windows of a 4-pixel-padded crop, unchanged."""
    done = prepare('pad', pictures / 'train', pictures / 'padded', '--workers', 1)
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((ROOT / 'train_scripts' / 'recipes' / 'tmm_small_image.yaml').read_text())
    transform = create_transform(
        tuple(recipe['input_size']), is_training=True, scale=recipe['scale'], ratio=recipe['ratio'],
        hflip=recipe['hflip'], color_jitter=recipe['color_jitter'], interpolation=recipe['train_interpolation'],
        mean=(0, 0, 0), std=(1, 1, 1))
    original = np.asarray(Image.open(pictures / 'train' / 'a' / '0.png'))
    border = np.pad(original, ((4, 4), (4, 4), (0, 0)))
    windows = {
        np.ascontiguousarray(border[y:y + 32, x:x + 32][:, ::flip]).tobytes()
        for y in range(9) for x in range(9) for flip in (1, -1)}
    padded = Image.open(pictures / 'padded' / 'a' / '0.png')
    torch.manual_seed(0)
    drawn = set()
    for _ in range(4000):
        pixels = (transform(padded) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        drawn.add(pixels.tobytes())
    assert drawn <= windows, 'a draw is no window'
    assert len(drawn) == len(windows) == 162


def test_padding_goes_on_and_names_broken_pictures(pictures):
    (pictures / 'train' / 'a' / 'broken.png').write_bytes(b'\x89PNG, not')
    (pictures / 'train' / 'a' / 'notes.txt').write_text('no picture')
    done = prepare('pad', pictures / 'train', pictures / 'padded', '--workers', 1)
    assert done.returncode == 1
    assert 'not padded' in done.stderr
    assert 'broken.png' in done.stderr
    assert len(list((pictures / 'padded').rglob('*.*'))) == 6, 'nothing half-written, nothing that is no picture'
    assert len(create_dataset('', root=str(pictures / 'padded'))) == 6

    (pictures / 'padded' / 'b' / '1.png').unlink()
    kept = (pictures / 'padded' / 'a' / '1.png').stat().st_mtime_ns
    (pictures / 'train' / 'a' / 'broken.png').unlink()
    assert prepare('pad', pictures / 'train', pictures / 'padded', '--workers', 2).returncode == 0
    assert (pictures / 'padded' / 'b' / '1.png').exists()
    assert (pictures / 'padded' / 'a' / '1.png').stat().st_mtime_ns == kept


@pytest.mark.parametrize(('args', 'message'), [
    (['pad', 'nowhere', 'out'], 'nowhere is not a folder'),
    (['pad', '.', 'out', '--padding', '0'], '--padding must be at least 1, got 0'),
])
def test_bad_arguments(args, message, tmp_path):
    done = prepare(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path('out').exists()


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / 'empty').mkdir()
    done = prepare('pad', tmp_path / 'empty', tmp_path / 'out')
    assert done.returncode == 1
    assert 'holds no image' in done.stderr


def test_recipe_model_exists():
    assert 'spa_mobilenetv2_cifar' in timm.list_models()
