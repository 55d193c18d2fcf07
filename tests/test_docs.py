"""README and docs: code blocks run, links work, and the HTML pages build without warnings."""
import collections
import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import safetensors.torch
import timm
import torch
import yaml
from hub_server import File, Repository
from PIL import Image
from timm.models import _registry

import timm_spa
import timm_spa_cli
from timm_spa.models import GATES
from timm_spa.predict import sample_image
from timm_spa.profile import LIST

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'docs' / 'finetune.ipynb'
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md'))]
sys.path.insert(0, str(ROOT / 'docs'))

from dead_links import Page, dead_links  # noqa: E402
from tables import DOCS, TABLES, with_tables  # noqa: E402


def code_blocks(page):
    """Returns the Python blocks of a page, each with the output in a text block that follows it, if any."""
    return re.findall(
        r'^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?', page.read_text(encoding='utf-8'), re.M | re.S)


@pytest.mark.parametrize(
    'page', [page for page in PAGES if code_blocks(page) and page.name != 'your_network.md'],
    ids=lambda page: page.name)
def test_code(page, monkeypatch, capsys):
    """Runs the code blocks of a page in order, and compares the output. Random weights replace weights from the Hub."""
    create = timm.create_model

    def without_hub(name, pretrained=False, **kwargs):
        return create(name, pretrained=pretrained and bool(timm.get_pretrained_cfg(name).file), **kwargs)

    monkeypatch.setattr(timm, 'create_model', without_hub)
    with contextlib.ExitStack() as stack:
        if page.name == 'CONTRIBUTING.md':  # registers models
            module = ModuleType('timm_spa.models.example')
            stack.enter_context(mock.patch.dict(sys.modules, {module.__name__: module}))
            for value in vars(_registry).values():
                if type(value) in (dict, collections.defaultdict):
                    stack.enter_context(mock.patch.dict(value))
            names = vars(module)
        else:
            names = {}
        names.update(timm=timm, torch=torch)
        for block, expected in code_blocks(page):
            exec(block, names)
            out = capsys.readouterr().out
            if expected:
                assert out == expected
            elif 'add_attention' in block and 'print' in block:
                assert re.match(r'tensor\(0\.', out)


@pytest.fixture
def your_network(hub, tmp_path, monkeypatch):
    """The blocks of the page by language. The Hub has random weights, and the working folder a photograph."""
    weights = timm.create_model('resnet18').state_dict()
    for tensor in weights.values():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    content = safetensors.torch.save(weights)
    repository = hub.repositories['timm/resnet18.a1_in1k'] = Repository(private=False)
    repository.commit('main', {
        'model.safetensors': File(hashlib.sha256(content).hexdigest(), content, large=True)})
    hub.large_files[hashlib.sha256(content).hexdigest()] = content
    monkeypatch.chdir(tmp_path)
    Image.open(sample_image('coffee')).save('beet.jpg')
    text = (ROOT / 'docs' / 'your_network.md').read_text(encoding='utf-8')
    return dict(re.findall(r'^```(python|bash)\n(.*?)^```', text, re.M | re.S))


def test_your_network(your_network, tmp_path, capsys):
    """The page has ten lines of Python and six commands, of which two are for a shell."""
    python, commands = your_network['python'].split('\n'), your_network['bash'].splitlines()
    assert (sum(map(bool, python)), len(commands)) == (10, 6)
    exec(your_network['python'], {})
    for command in commands[1:]:
        if command.startswith('echo '):
            subprocess.run(command, shell=True, check=True)
            continue
        program, *arguments = shlex.split(command)
        assert program == 'timm-spa'
        assert timm_spa_cli.main(arguments) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert arguments[0] != 'predict' or {'beet', 'carrot', 'onion'} < set(out.split())
    assert 'license: cc-by-4.0' in (tmp_path / 'repository' / 'README.md').read_text()


@pytest.mark.slow
def test_your_network_in_new_processes(your_network, hub, tmp_path):
    environment = hub.environment(tmp_path / 'home')
    environment['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), environment['PATH']])
    subprocess.run([sys.executable, '-c', your_network['python']], env=environment, check=True)
    done = subprocess.run(
        ['bash', '-e', '-c', your_network['bash']], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('3\n')
    assert done.stdout.count('beet.jpg') == 2
    assert 'Largest difference from PyTorch' in done.stdout


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
    assert done.stdout.endswith('chelsea -> cat\ncoffee -> coffee\n')


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


def test_links_between_built_pages(built):
    assert dead_links(built) == []
    results = Page(built / 'results.html').links
    assert 'training.html' in results, 'links to an included file lead to the page that includes it'
    page = Page(built / 'how_it_works.html')
    assert '_static/mathjax/tex-chtml.js' in [link.partition('?')[0] for link in page.loaded]
    copied = [link for link in results if re.fullmatch(r'_downloads/.*ablate\.csv', link)]
    assert copied, 'linked files outside of docs are copied'


def test_dead_links_are_detected(tmp_path):
    (tmp_path / 'b.html').write_text('<p id="place">')
    (tmp_path / 'a.html').write_text(
        '<a href="b.html#place"><a href="b.html#other"><a href="c.html"><img src="d.png"><a href="#here">'
        '<a href="https://example.org/x.html"><script src="https://example.org/x.js"></script>')
    assert [link for _, link in dead_links(tmp_path)] == [
        'b.html#other', 'c.html', 'd.png', '#here', 'https://example.org/x.js']


def test_table_of_gates():
    """Every gate of add_attention has a row, with the cost of models.json and the neutral start of the package."""
    listed = json.loads(LIST.read_text())
    costs, speeds = listed['gates'], listed['speeds']
    starts = {None: 'none: `neutral=False` only', 0: 'adds 0', 1: 'gate 1/2, doubled', 2: 'two gates of 1/2, times 4'}
    text = (ROOT / 'docs' / 'add_attention.md').read_text(encoding='utf-8')
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('| `')]
    assert sorted(name.strip('`') for name, *_ in rows) == sorted(costs)
    for name, _, _, _, start, *cells in rows:
        gate = name.strip('`')
        assert start == ('' if gate == 'none' else starts[GATES[gate].doublings]), gate
        added = {key: value - costs['none'][key] for key, value in costs[gate].items()}
        assert cells == [
            f'{added["parameters"]:,}', f'{added["macs"] / 1e6:,.1f}', f'{added["kept"] / 2 ** 20:.1f}',
            *(f'{speeds[mode]["ratios"][gate]:.2f}' for mode in ('infer', 'train'))], gate


@pytest.mark.parametrize('path', [
    ROOT / 'CITATION.cff', ROOT / '.pre-commit-config.yaml', *sorted((ROOT / '.github').rglob('*.yml'))],
    ids=lambda path: path.name)
def test_repository_files_are_valid_yaml(path):
    assert yaml.safe_load(path.read_text(encoding='utf-8'))


def test_the_workflow_runs_targets_of_the_makefile():
    jobs = yaml.safe_load((ROOT / '.github' / 'workflows' / 'ci.yml').read_text(encoding='utf-8'))['jobs']
    matrix = jobs['test']['strategy']['matrix']
    targets = {*matrix['target'], *(case['target'] for case in matrix['include'])}
    assert targets == {'test', 'test-lowest', 'test-newest'}
    known = re.findall(r'^([\w-]+(?: [\w-]+)*):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.M)
    assert targets | {'docs', 'tables'} <= {target for line in known for target in line.split()}


@pytest.mark.parametrize('file', [file for file, _ in TABLES.values()])
def test_generated_tables(file):
    """The tables of models and of command-line options are those that `make tables` writes."""
    assert (DOCS / file).read_text(encoding='utf-8') == with_tables(DOCS / file), 'run `make tables`'


def test_table_of_models_is_complete():
    text = (DOCS / 'models.md').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| `(\w+)` \| [^|]+ \| ([\d.]+) \| ', text, re.M))
    assert sorted(rows) == sorted(timm_spa.list_models())
    assert rows['spa_resnet50'] == '28.07'
