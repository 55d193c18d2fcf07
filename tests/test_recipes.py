"""Recipes and launch configurations by name, from a checkout and from a wheel."""
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import timm_spa_cli
from timm_spa import run
from timm_spa._shipped import shipped_files

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / 'train_scripts'


def test_list_show_and_copy(tmp_path, capsys):
    assert timm_spa_cli.main(['recipes']) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in (SCRIPTS / 'recipes').iterdir()} | {
        f'accelerate/{path.stem}' for path in (SCRIPTS / 'accelerate').iterdir()}
    assert {line.split()[0] for line in lines[1:-2]} == names == set(shipped_files())
    assert all(len(line.split()) > 2 for line in lines[1:-2]), 'each says what it is for'
    text = (SCRIPTS / 'recipes' / 'tmm_small_image.yaml').read_text()
    assert timm_spa_cli.main(['recipes', 'tmm_small_image']) == 0
    assert capsys.readouterr().out == text
    assert timm_spa_cli.main(['recipes', 'tmm_small_image', '--to', str(tmp_path / 'mine.yaml')]) == 0
    assert (tmp_path / 'mine.yaml').read_text() == text
    assert timm_spa_cli.main(['recipes', 'tmm_smal_image']) == 1
    assert 'Did you mean tmm_small_image?' in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [['--config', 'recipe:finetune_warm'], ['--config=recipe:finetune_warm']])
def test_a_recipe_by_name(arguments, tmp_path, capfd):
    (tmp_path / 'train.py').write_text('import sys; print(*sys.argv[1:])')
    command = [sys.executable, '-m', 'timm_spa.run', 'train', '--timm-scripts', str(tmp_path), *arguments]
    done = subprocess.run([*command, '--x', 'a:recipe:b'], capture_output=True, text=True, check=True)
    *config, x, empty = done.stdout.split()
    assert (x, empty) == ('--x', 'a:recipe:b')
    path = ' '.join(config).replace('=', ' ').split()[-1]
    assert yaml.safe_load(Path(path).read_text()) == yaml.safe_load(shipped_files()['finetune_warm'].read_text())
    assert run.main(['train', '--timm-scripts', str(tmp_path), '--config', 'recipe:none']) == 2
    assert "There is no recipe 'none'" in capfd.readouterr().err


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w', tmp_path, ROOT], check=True)
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        wheel.extractall(tmp_path / 'installed')
    code = 'import timm_spa._shipped as s; print(s.__file__, *s.shipped_files())'
    environment = {'PYTHONPATH': str(tmp_path / 'installed')}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert set(names) == set(shipped_files())
