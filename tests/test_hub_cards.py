"""Every folder of hub_cards/: the card agrees with the files of the folder."""
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import yaml

from timm_spa.hub.card import card_of_folder
from timm_spa.predict import sample_image
from timm_spa.profile import count_cost

ROOT = Path(__file__).parent.parent
CARDS = sorted(path.parent for path in (ROOT / 'hub_cards').glob('*/config.json'))


def parts(text):
    _, front_matter, body = text.split('---\n', 2)
    return yaml.safe_load(front_matter), body


def weights_of(folder):
    local = folder / 'model.safetensors'
    return local if local.exists() else Path(timm.get_pretrained_cfg(folder.name).file)


@pytest.mark.parametrize('folder', CARDS, ids=lambda p: p.name)
def test_card_is_up_to_date(folder):
    text = (folder / 'README.md').read_text()
    repository = re.search(r"create_model\('hf-hub:([^']+)'", text)
    architecture = folder.name.partition('.')[0]
    sweeps = {path.parent for path in (ROOT / 'train_scripts' / 'results').glob(f'*/{architecture}-seed*')}
    sweep = sweeps.pop() if '## Comparison' in text else None
    assert not sweeps
    made = card_of_folder(folder, repository and repository[1], sweep)
    assert text == str(made), f'run `timm-spa card {folder} --write`'


@pytest.mark.parametrize('folder', CARDS, ids=lambda p: p.name)
def test_card_config_cfg_and_results_agree(folder):
    metadata, body = parts((folder / 'README.md').read_text())
    config = json.loads((folder / 'config.json').read_text())
    cfg = timm.get_pretrained_cfg(folder.name, allow_unregistered=False)
    facts = yaml.safe_load((folder / 'card.yaml').read_text())
    assert {p.name for p in folder.iterdir()} <= {*(figure['file'] for figure in facts.get('figures', ()))} | {
        'README.md', 'config.json', 'args.yaml', 'summary.csv', 'run.json', 'card.yaml', 'model.safetensors'}
    assert f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}' == folder.name
    assert metadata['license'] == config['pretrained_cfg']['license'] == cfg.license
    assert metadata['library_name'] == 'timm'
    assert metadata['pipeline_tag'] == 'image-classification'
    assert 'transformers' not in metadata['tags'], 'the Hub would show code without `import timm_spa`'
    for field in ('mean', 'std', 'input_size'):
        assert tuple(config['pretrained_cfg'][field]) == getattr(cfg, field)
    for field in ('crop_pct', 'interpolation', 'num_classes'):
        assert config['pretrained_cfg'][field] == getattr(cfg, field)
    labels = dict(config['pretrained_cfg'], **config)
    assert labels.get('label_names') == (list(cfg.label_names) if cfg.label_names else None)
    assert labels.get('label_descriptions') == cfg.label_descriptions
    assert 'num_classes' not in config.get('model_args', {}), 'transformers fails with it'

    model = timm.create_model(config['architecture'], num_classes=config['num_classes'])
    model.load_state_dict(safetensors.torch.load_file(weights_of(folder)), strict=True)
    assert f'({sum(p.numel() for p in model.parameters()):,})' in body
    result = metadata['model-index'][0]['results'][0]
    assert metadata['model-index'][0]['name'] == folder.name
    scores = [metric['value'] for metric in result['metrics']]
    for name, score in zip(('top-1', 'top-5'), scores, strict=True):
        assert f'{name} {score} %' in ' '.join(cfg.notes), 'the registered cfg says the same'
        assert f'{name} {score} %' in body.lower()
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    if result['dataset']['split'] == args['val_split']:
        rows = [line.split(',') for line in (folder / 'summary.csv').read_text().splitlines()[1:]]
        own = max(float(row[3]) for row in rows)
        assert scores[0] == pytest.approx(own, abs=0.1), "the run's own evaluation may be in half precision"
    else:
        name = f'{args["model"]}-seed{args["seed"]}/{result["dataset"]["split"]}.csv'
        kept, = (ROOT / 'train_scripts' / 'results').glob(f'*/{name}')
        own = [len(set(line.split(','))) == 1 for line in kept.read_text().splitlines()[1:]]
        assert scores[0] == pytest.approx(100 * sum(own) / len(own), abs=0.05), 'in float32'
    assert args['model'] == config['architecture']
    assert f'seed {args["seed"]}' in body
    for command in re.findall(r'accelerate launch .*?(?=\n```)', body, re.DOTALL):
        assert ' '.join(command.replace('\\\n', ' ').split()) in ' '.join(cfg.notes)
    versions = json.loads((folder / 'run.json').read_text())['versions']
    assert all(f'{name} {version}' in ' '.join(cfg.notes) for name, version in versions.items())


def numbers(text):
    return {float(n.replace(',', '')) for n in re.findall(r'(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\d])', text)}


@pytest.mark.parametrize('folder', CARDS, ids=lambda p: p.name)
def test_every_number_has_a_source(folder):
    """Every number of the text is in a file of the folder, is an epoch, or is counted here."""
    _, body = parts((folder / 'README.md').read_text())
    body = re.sub(r'```(?:python|bibtex).*?```', '', body, flags=re.DOTALL)
    body = re.sub(r'^(\|(?: \w+_\w+ ).*)\|[ .\d]+\|[ .\d]+\|$', r'\1|', body, flags=re.MULTILINE)  # see test_card.py
    known = set()
    for name in ('config.json', 'args.yaml', 'run.json', 'card.yaml'):
        known |= numbers((folder / name).read_text())
    rows = [line.split(',') for line in (folder / 'summary.csv').read_text().splitlines() if line[0] != 'e']
    known |= {round(float(cell), 3) for row in rows for cell in row} | {float(row[0]) + 1 for row in rows}
    config = json.loads((folder / 'config.json').read_text())
    cost = count_cost(config['architecture'], num_classes=config['num_classes'])
    known |= {cost.parameters, round(cost.parameters / 1e6, 2), round(cost.macs / 1e9, 3),
              round(cost.activations / 1e6, 2), round(weights_of(folder).stat().st_size / 1e6, 1)}
    known |= {1, 5}  # in top-1 and top-5
    for table in (ROOT / 'train_scripts' / 'results').glob('*/table.md'):  # compared with its runs in test_sweep.py
        known |= numbers(table.read_text()) if '## Comparison' in body else set()
    assert numbers(body) <= known, 'numbers without a source'


@pytest.mark.parametrize('folder', CARDS, ids=lambda p: p.name)
def test_snippets_of_a_card_run(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / 'repository')
    shutil.copy(weights_of(folder), tmp_path / 'repository' / 'model.safetensors')
    run_snippets((folder / 'README.md').read_text(), tmp_path / 'repository', monkeypatch)


def run_snippets(text, repository, monkeypatch):
    """Runs the Python code of a card for timm, with a folder instead of the repository."""
    monkeypatch.chdir(repository)
    shutil.copy(sample_image('chelsea'), repository / 'image.jpg')
    *snippets, for_transformers = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(snippets) == 3, 'classes, feature maps, embedding'
    assert for_transformers.startswith('import timm_spa\nfrom transformers'), 'see hosts/test_cards.py'
    values = []
    for snippet in snippets:
        assert snippet.startswith('import timm_spa\n')
        code, count = re.subn(r"create_model\('[^']+'", f"create_model('local-dir:{repository}'", snippet)
        assert count == 1
        values.append({})
        exec(code, values[-1])
    assert values[0]['probabilities'].sum() <= 1.0001
    return values
