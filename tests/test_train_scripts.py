"""The recipes and launch configurations."""
import json
from pathlib import Path

import pytest
import timm
import yaml

import timm_spa  # noqa: F401

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / 'train_scripts' / 'recipes').glob('*.yaml'))
OPTIONS = json.loads((ROOT / 'tests' / 'timm_options' / 'train-1.0.28.json').read_text())['options']


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
    assert config.num_processes == {'cpu': 1, 'gpu1': 1, 'gpu8': 8, 'gpu2x8': 16}[path.stem]
    assert f'--config_file train_scripts/accelerate/{path.name}' in path.read_text()


def test_recipe_model_exists():
    assert 'spa_mobilenetv2_cifar' in timm.list_models()
