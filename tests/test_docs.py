"""The pages are built without a warning, and the Python code of README and pages runs as it stands."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_spa
from timm_spa.profile import LIST

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'docs' / 'finetune.ipynb'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def blocks(page):
    return re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code(page, monkeypatch, capsys):
    """The blocks of a page one after another. Weights of the Hub are left out: random ones are as good to run it."""
    create = timm.create_model

    def without_hub(name, pretrained=False, **kwargs):
        return create(name, pretrained=pretrained and bool(timm.get_pretrained_cfg(name).file), **kwargs)

    monkeypatch.setattr(timm, 'create_model', without_hub)
    names = {'timm': timm, 'torch': torch}
    for block in blocks(page):
        exec(block, names)
        if 'add_attention' in block and 'print' in block:
            assert re.match(r'tensor\(0\.', capsys.readouterr().out)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_to_files(page):
    """Links and pictures that are no addresses are files of the project."""
    text = re.sub(r'^```(?!\{image).*?^```', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    links = re.findall(r'\]\(([^)#]+)[^)]*\)', text) + re.findall(r'\{image\} (\S+)', page.read_text(encoding='utf-8'))
    missing = [link for link in links if '://' not in link and not (page.parent / link).exists()]
    assert not missing


def test_notebook_is_shown_as_it_ran():
    """Its outputs are those of one run from top to bottom, without an error or a path of a machine."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    assert {output['output_type'] for output in outputs} == {'stream', 'execute_result'}
    assert not re.search(r'/(home|root|tmp|work|Users)/', json.dumps(outputs))


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """In one process, without a network; what it says of the result is checked."""
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
        env=dict(os.environ, HF_HUB_OFFLINE='1'))
    assert done.returncode == 0, done.stderr
    assert 'largest difference: 0.0\n' in done.stdout
    assert 'problems: []\n' in done.stdout
    assert done.stdout.endswith('Garant-Ecological-Medium-Fat-Milk -> carton\nGreen-Bell-Pepper -> vegetable\n')


def test_pages_are_built(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '--fail-on-warning', '--quiet', str(ROOT / 'docs'), str(tmp_path / 'out')],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'out' / 'api.html').read_text()
    for name in ('SpatialPyramidAttention', 'add_attention', 'gate_maps', 'write_repository'):
        assert f'>{name}<' in page


@pytest.mark.parametrize('path', [
    ROOT / 'CITATION.cff', ROOT / '.pre-commit-config.yaml', *sorted((ROOT / '.github').rglob('*.yml'))],
    ids=lambda path: path.name)
def test_files_of_the_repository_are_yaml(path):
    assert yaml.safe_load(path.read_text(encoding='utf-8'))


def test_table_of_models():
    """It names every network with SPA-A, with parameters and multiply-adds as they are counted for `timm-spa list`."""
    counted = json.loads(LIST.read_text())
    named = []
    for line in (ROOT / 'docs' / 'models.md').read_text().splitlines():
        cells = line.strip('| ').split(' | ')
        if len(cells) != 6 or '`spa_' not in cells[1]:
            continue
        names = []
        for word in re.findall(r'`([^`]+)`', cells[1]):  # later ones may be endings: `spa_resnet18` `34`
            last = names[-1] if names else ''
            meant = [word, *(last[:i] + word + end for i in range(len(last), 0, -1) for end in ('', '_cifar'))]
            names.append(next(name for name in meant if name in counted))
        named += names
        for cell, key, unit in ((cells[2], 'parameters', 1e6), (cells[3], 'macs', 1e9)):
            figures = re.findall(r'[\d.]+', cell)
            if '(' in cell:  # for another number of classes
                continue
            for name, figure in zip(names, figures, strict=len(figures) > 1):
                digits = len(figure.partition('.')[2])
                assert f'{counted[name][key] / unit:.{digits}f}' == figure, (name, key)
    assert sorted(named) == sorted(n for n in timm_spa.list_models('spa_*') if not re.match('spa_[bc]_', n))
