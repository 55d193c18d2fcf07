"""README and docs: code blocks run, links work, and the HTML pages build without warnings."""
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
import yaml

import timm_spa
from timm_spa.profile import LIST

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'docs' / 'finetune.ipynb'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def code_blocks(page):
    return re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.M | re.S)


@pytest.mark.parametrize('page', [page for page in PAGES if code_blocks(page)], ids=lambda page: page.name)
def test_code(page, monkeypatch, capsys):
    """Runs the code blocks of a page in order. Random weights replace weights from the Hub."""
    create = timm.create_model

    def without_hub(name, pretrained=False, **kwargs):
        return create(name, pretrained=pretrained and bool(timm.get_pretrained_cfg(name).file), **kwargs)

    monkeypatch.setattr(timm, 'create_model', without_hub)
    names = {'timm': timm, 'torch': torch}
    for block in code_blocks(page):
        exec(block, names)
        if 'add_attention' in block and 'print' in block:
            assert re.match(r'tensor\(0\.', capsys.readouterr().out)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_to_files(page):
    """Relative links and images exist."""
    text = re.sub(r'^```(?!\{image).*?^```', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    links = re.findall(r'\]\(([^)#]+)[^)]*\)', text) + re.findall(r'\{image\} (\S+)', page.read_text(encoding='utf-8'))
    missing = [link for link in links if '://' not in link and not (page.parent / link).exists()]
    assert not missing


def test_notebook_outputs_are_of_one_run():
    """The cells ran once from top to bottom. Their outputs contain no errors and no local paths."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    assert {output['output_type'] for output in outputs} == {'stream', 'execute_result'}
    assert not re.search(r'/(home|root|tmp|work|Users)/', json.dumps(outputs))


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """Runs the notebook in one process without a network, and checks the printed results."""
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
        env=dict(os.environ, HF_HUB_OFFLINE='1'))
    assert done.returncode == 0, done.stderr
    assert 'largest difference: 0.0\n' in done.stdout
    assert 'problems: []\n' in done.stdout
    assert done.stdout.endswith('Garant-Ecological-Medium-Fat-Milk -> carton\nGreen-Bell-Pepper -> vegetable\n')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """Builds the HTML pages and fails on warnings."""
    out = tmp_path_factory.mktemp('docs') / 'out'
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '--fail-on-warning', '--quiet', str(ROOT / 'docs'), str(out)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_pages_are_built(built):
    page = (built / 'api.html').read_text()
    for name in ('SpatialPyramidAttention', 'add_attention', 'gate_maps', 'write_repository'):
        assert f'>{name}<' in page


class Page(HTMLParser):
    """Collects the links of an HTML page and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.update(values[key] for key in ('id', 'name') if values.get(key))
        self.links += [values[key] for key in ('href', 'src') if values.get(key)]


def dead_links(folder):
    """Returns the links between HTML files of a folder whose file or anchor does not exist."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob('*.html'))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchor = unquote(url.fragment)
            if not target.is_file() or anchor and target in pages and anchor not in pages[target].anchors:
                dead.append((path.name, link))
    return dead


def test_links_between_built_pages(built):
    assert dead_links(built) == []
    results = Page(built / 'results.html').links
    assert 'training.html' in results, 'links to an included file lead to the page that includes it'
    copied = [link for link in results if re.fullmatch(r'_downloads/.*ablate\.csv', link)]
    assert copied, 'linked files outside of docs are copied'


def test_dead_links_are_detected(tmp_path):
    (tmp_path / 'b.html').write_text('<p id="place">')
    (tmp_path / 'a.html').write_text(
        '<a href="b.html#place"><a href="b.html#other"><a href="c.html"><img src="d.png"><a href="#here">'
        '<a href="https://example.org/x.html">')
    assert [link for _, link in dead_links(tmp_path)] == ['b.html#other', 'c.html', 'd.png', '#here']


def test_gates_on_the_page_of_add_attention():
    """Every gate that the page lists can be added."""
    text = (ROOT / 'docs' / 'add_attention.md').read_text(encoding='utf-8')
    offered = re.search(r'`gate` is one of (.*?) \(', text, re.S)[1]
    for gate in re.findall('`(.+?)`', offered):
        timm_spa.add_attention(timm.create_model('resnet10t'), gate)


@pytest.mark.parametrize('path', [
    ROOT / 'CITATION.cff', ROOT / '.pre-commit-config.yaml', *sorted((ROOT / '.github').rglob('*.yml'))],
    ids=lambda path: path.name)
def test_repository_files_are_valid_yaml(path):
    assert yaml.safe_load(path.read_text(encoding='utf-8'))


def test_table_of_models():
    """Lists every SPA-A model, with the parameters and multiply-adds of models.json."""
    counted = json.loads(LIST.read_text())
    listed = []
    for line in (ROOT / 'docs' / 'models.md').read_text().splitlines():
        cells = line.strip('| ').split(' | ')
        if len(cells) != 6 or '`spa_' not in cells[1]:
            continue
        names = []
        for word in re.findall(r'`([^`]+)`', cells[1]):  # may be only a suffix: `spa_resnet18` `34`
            last = names[-1] if names else ''
            candidates = [word, *(last[:i] + word + end for i in range(len(last), 0, -1) for end in ('', '_cifar'))]
            names.append(next(name for name in candidates if name in counted))
        listed += names
        for cell, key, unit in ((cells[2], 'parameters', 1e6), (cells[3], 'macs', 1e9)):
            figures = re.findall(r'[\d.]+', cell)
            if '(' in cell:  # for another number of classes
                continue
            for name, figure in zip(names, figures, strict=len(figures) > 1):
                digits = len(figure.partition('.')[2])
                assert f'{counted[name][key] / unit:.{digits}f}' == figure, (name, key)
    assert sorted(listed) == sorted(n for n in timm_spa.list_models('spa_*') if not re.match('spa_[bc]_', n))
