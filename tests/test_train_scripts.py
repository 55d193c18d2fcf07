"""Contents of the recipes and launch configurations."""
import json
import os
import subprocess
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
    """timm's script silently ignores unknown keys."""
    recipe = yaml.safe_load(path.read_text())
    for key, value in recipe.items():
        assert key in OPTIONS, f'{path.name}: {key} is not an option of train.py'
        option = OPTIONS[key]
        if option['choices'] is not None:
            assert value in option['choices']
        types = dict(int=int, float=(int, float), str=str).get(option['type'])
        if types is not None:
            for item in value if isinstance(value, list) else [value]:
                assert isinstance(item, types), f'{path.name}: {key} is {item!r}'
    assert path.read_text().startswith('#'), 'the header is missing'


@pytest.mark.parametrize('path', sorted((ROOT / 'train_scripts' / 'accelerate').glob('*.yaml')), ids=lambda p: p.name)
def test_launch_configurations_are_valid(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == {'cpu': 1, 'gpu1': 1, 'gpu8': 8, 'gpu2x8': 16}[path.stem]
    assert f'--config_file train_scripts/accelerate/{path.name}' in path.read_text()


def test_recipe_model_exists():
    assert 'spa_mobilenetv2_cifar' in timm.list_models()


def test_slurm_example_starts_each_node_and_resumes(tmp_path):
    """With replacements of SLURM's commands and of the launcher, which print their arguments."""
    for name, script in {
            'scontrol': 'echo node1; echo node2',
            'srun': 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
            'accelerate': 'printf "%s|" "$@"; echo'}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{script}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'runs' / 'x').mkdir(parents=True)
    env = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='node[1-2]')
    command = [
        'bash', ROOT / 'train_scripts' / 'accelerate' / 'slurm_2x8.sh', '--output', 'runs', '--experiment', 'x',
        '--model-kwargs', 'a=b c']

    def launches():
        return subprocess.run(
            command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout.splitlines()

    config = 'launch|--config_file|train_scripts/accelerate/gpu2x8.yaml|--machine_rank|{}|--main_process_ip|node1|'
    tail = '--main_process_port|29500|-m|timm_spa.run|train|--output|runs|--experiment|x|--model-kwargs|a=b c|'
    assert launches() == [config.format(rank) + tail for rank in (0, 1)]
    (tmp_path / 'runs' / 'x' / 'last.pth.tar').touch()
    assert launches()[1] == config.format(1) + tail + '--resume|runs/x/last.pth.tar|'
