"""Recipes and launch configurations by name, in a checkout and in a wheel."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import timm_spa_cli
from timm_spa._shipped import shipped_files
from timm_spa.training import runner as run

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / 'train_scripts'


def test_list_show_and_copy(tmp_path, capsys):
    assert timm_spa_cli.main(['recipes']) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {path.stem for path in (SCRIPTS / 'recipes').iterdir()} | {
        f'accelerate/{path.stem}' for path in (SCRIPTS / 'accelerate').iterdir()}
    assert {line.split()[0] for line in lines[1:-2]} == names == set(shipped_files())
    assert all(len(line.split()) > 2 for line in lines[1:-2]), 'each has a description'
    text = (SCRIPTS / 'recipes' / 'tmm_small_image.yaml').read_text()
    assert timm_spa_cli.main(['recipes', 'tmm_small_image']) == 0
    assert capsys.readouterr().out == text
    assert timm_spa_cli.main(['recipes', 'tmm_small_image', '--out', str(tmp_path / 'mine.yaml')]) == 0
    assert (tmp_path / 'mine.yaml').read_text() == text
    assert timm_spa_cli.main(['recipes', 'tmm_smal_image']) == 1
    assert 'Did you mean tmm_small_image?' in capsys.readouterr().err


@pytest.mark.parametrize('arguments', [
    ['--config', 'recipe:finetune_warm'], pytest.param(['--config=recipe:finetune_warm'], marks=pytest.mark.slow)])
def test_recipe_by_name(arguments, tmp_path, capfd):
    (tmp_path / 'train.py').write_text('import sys; print(*sys.argv[1:])')
    command = [sys.executable, '-m', 'timm_spa.run', 'train', '--timm-scripts', str(tmp_path), *arguments]
    done = subprocess.run([*command, '--x', 'a:recipe:b'], capture_output=True, text=True, check=True)
    *config, x, empty = done.stdout.split()
    assert (x, empty) == ('--x', 'a:recipe:b')
    path = ' '.join(config).replace('=', ' ').split()[-1]
    assert yaml.safe_load(Path(path).read_text()) == yaml.safe_load(shipped_files()['finetune_warm'].read_text())
    assert run.main(['train', '--timm-scripts', str(tmp_path), '--config', 'recipe:none']) == 2
    assert "Unknown recipe 'none'" in capfd.readouterr().err


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """Environment variables that make Python import the package from a wheel instead of the checkout."""
    folder = tmp_path_factory.mktemp('wheel')
    # through the source distribution, because two simultaneous builds in one folder conflict
    subprocess.run([sys.executable, '-m', 'build', '--outdir', folder, ROOT], check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel:
        wheel.extractall(folder / 'installed')
    return dict(os.environ, PYTHONPATH=str(folder / 'installed'))


@pytest.mark.slow
def test_wheel_contains_all_recipes(installed):
    code = 'import timm_spa._shipped as s; print(s.__file__, *s.shipped_files())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=installed)
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(installed['PYTHONPATH'])
    assert set(names) == set(shipped_files())


@pytest.mark.slow
def test_training_publishing_and_prediction_from_the_wheel(installed, timm_scripts, tmp_path):
    """As after `pip install`, in a folder outside the checkout."""
    for split in ('train', 'validation'):
        for label, colour in (('dusk', 40), ('noon', 220)):
            (tmp_path / 'data' / split / label).mkdir(parents=True)
            for i in range(8):
                image = Image.new('RGB', (40, 40), (colour, colour, 100 + i))
                image.save(tmp_path / 'data' / split / label / f'{i}.png')

    def call(*command):
        done = subprocess.run(
            [sys.executable, '-m', *command], cwd=tmp_path, env=installed, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call('timm_spa.run', 'train', '--timm-scripts', str(timm_scripts), '--config', 'recipe:tmm_small_image', '--model',
         'spa_mobilenetv2_cifar', '--num-classes', '2', '--data-dir', 'data', '--val-split', 'validation', '--device',
         'cpu', '--workers', '0', '--batch-size', '8', '--epochs', '2', '--output', 'runs', '--experiment', 'first')
    (tmp_path / 'runs' / 'first' / 'card.yaml').write_text('dataset: {name: two greys}\nlicense: cc0-1.0\n')
    model = ['--model', 'spa_mobilenetv2_cifar.greys']
    call('timm_spa', 'publish', 'runs/first/last.pth.tar', *model, '--dry-run', 'out')
    assert 'No problem found' in call('timm_spa', 'verify', 'out')
    image = 'data/validation/noon/0.png'
    (entry,) = json.loads(call('timm_spa', 'predict', image, '--model', 'local-dir:out', '--json'))
    assert {c['name'] for c in entry['classes']} == {'dusk', 'noon'}
