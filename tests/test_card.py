"""Model cards state facts from files and measurements only."""
import copy
import json
import re
import shutil

import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from test_hub_cards import CARDS, ROOT, parts, run_snippets, weights_of

import timm_spa  # noqa: F401
import timm_spa_cli
from timm_spa.checkpoints.run_files import RunError
from timm_spa.hub.card import make_card
from timm_spa.hub.publish import PublishError, write_repository
from timm_spa.training.run_record import Run

MODEL = 'spa_preresnet18_cifar'
ARGS = dict(
    model=MODEL, seed=42, num_classes=10, opt='sgd', lr=0.1, momentum=0.9, weight_decay=5e-4, batch_size=256, epochs=2,
    sched='step', val_split='validation', output='runs', experiment='a', data_dir='DATA', model_kwargs={})
DATASET = dict(name='Ten things', id='Some-Org/Ten-Things')


def config_of(architecture, **kwargs):
    """Returns the configuration of a repository, written by hand."""
    cfg = timm.get_pretrained_cfg(architecture)
    fields = dict(
        input_size=list(cfg.input_size), mean=list(cfg.mean), std=list(cfg.std), crop_pct=cfg.crop_pct,
        interpolation=cfg.interpolation, license='apache-2.0', paper_ids=cfg.paper_ids, first_conv=cfg.first_conv,
        classifier=cfg.classifier)
    return dict(architecture=architecture, num_classes=10, pretrained_cfg=dict(fields, **kwargs))


def summary(*top1):
    return [dict(epoch=float(i), eval_top1=value, eval_top5=value + 20) for i, value in enumerate(top1)]


def keep(folder, args, *top1):
    """Writes the files of a run in the layout of a sweep."""
    path = folder / f'{args["model"]}-seed{args["seed"]}'
    path.mkdir(parents=True)
    (path / 'args.yaml').write_text(yaml.safe_dump(args))
    rows = [f'{i},1.0,1.0,{value},{value + 20},0.1' for i, value in enumerate(top1)]
    (path / 'summary.csv').write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', *rows]) + '\n')
    return path


def test_snippets_of_another_family_run(tmp_path, monkeypatch):
    """Few classes, and embeddings and feature maps of other widths."""
    config = dict(config_of('spa_densenet_cifar', num_classes=3), num_classes=3)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    model = timm.create_model('spa_densenet_cifar', num_classes=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors')
    values = run_snippets(str(make_card('spa_densenet_cifar', 'org/name', config=config)), tmp_path, monkeypatch)
    assert values[0]['classes'].shape == (1, 3)


def test_the_source_in_the_examples():
    """The registered name if it has weights; else the Hub, or the folder of the card."""
    shipped = CARDS[0].name
    config = config_of(shipped.partition('.')[0])
    for name, source in ((shipped, shipped), (f'{shipped}_mine', 'local-dir:.')):
        assert str(make_card(name, config=config)).count(f"create_model('{source}', pretrained=True") == 3


def test_unknown_facts_are_left_out():
    text = str(make_card(MODEL, config=config_of(MODEL)))
    metadata, body = parts(text)
    assert set(metadata) == {'license', 'library_name', 'pipeline_tag', 'tags'}
    for heading in ('Training', 'Evidence', 'Comparison', 'Evaluation'):
        assert f'## {heading}' not in body
    for heading in ('Model', 'Use', 'Limits', 'Citation'):
        assert f'## {heading}\n' in body
    assert not re.search(r'None|nan|TODO|\{\{|\{%|top-1|storage|dataset', body)
    assert '\n\n\n' not in body


@pytest.mark.parametrize(('epoch', 'chosen'), [(1, True), (2, False)])
def test_accuracy_of_the_epoch_of_the_weights(epoch, chosen):
    run = Run(args=ARGS, summary=summary(20.0, 31.2342, 30.5), facts=dict(dataset=DATASET))
    metadata, body = parts(str(make_card(f'{MODEL}.tag', 'org/name', run, config=config_of(MODEL), epoch=epoch)))
    result = metadata['model-index'][0]['results'][0]
    assert [m['value'] for m in result['metrics']] == ([31.234, 51.234] if chosen else [30.5, 50.5])
    assert result['dataset'] == dict(name='Ten things', type='Some-Org/Ten-Things', split='validation')
    assert metadata['datasets'] == ['Some-Org/Ten-Things'], 'in its exact case'
    assert ('the best of all epochs on these images' in body) == chosen
    assert f'epoch {epoch + 1} of 3' in body
    assert "create_model('hf-hub:org/name'" in body
    assert 'one run, seed 42: unknown spread over seeds' in body


def test_an_unknown_epoch_gives_no_accuracy():
    run = Run(args=ARGS, summary=summary(20.0, 31.0), facts=dict(dataset=DATASET))
    metadata, body = parts(str(make_card(MODEL, 'org/name', run, config=config_of(MODEL))))
    assert 'model-index' not in metadata
    assert '31' not in body


def test_imagenet_and_fine_tunes():
    """The id of the dataset comes from the tag, the start weights from the arguments."""
    args = dict(ARGS, model='spa_resnet18', pretrained=True)
    config = config_of('spa_resnet18')
    metadata, body = parts(str(make_card('spa_resnet18.ft_in1k', 'org/name', Run(args=args), config=config)))
    assert metadata['datasets'] == ['ILSVRC/imagenet-1k']
    assert metadata['base_model'] == 'timm/resnet18.a1_in1k'
    assert 'known biases' in body
    args = dict(args, pretrained=False)
    metadata, _ = parts(str(make_card('spa_resnet18.ft_in1k', 'org/name', Run(args=args), config=config)))
    assert 'base_model' not in metadata


def test_evidence():
    record = dict(
        model=MODEL, seed=42, command="accelerate launch -m x --model-kwargs 'a=(1, 2)' --seed 42", seconds=5400,
        hardware='1 x GPU', python='3.11.7', versions=dict(timm='1.0.31'))
    _, body = parts(str(make_card(MODEL, 'o/n', Run(args=ARGS, record=record), config=config_of(MODEL))))
    for fact in ('hardware: 1 x GPU', '1.50 hours', 'Python 3.11.7, timm 1.0.31', "--model-kwargs 'a=(1, 2)' --seed"):
        assert fact in body


MARKUP = 'x<script>alert(1)</script> | y\n# heading\n```\nimport os'


def test_text_from_files_is_escaped():
    args = dict(ARGS, opt=MARKUP, sched=MARKUP, lr='0.1', val_split=MARKUP, amp=True, amp_dtype=MARKUP)
    record = dict(
        model=MODEL, seed=42, seconds=3, command=f'train --a {MARKUP}', hardware=MARKUP, python=MARKUP,
        versions={'timm': MARKUP})
    facts = dict(dataset=dict(name=MARKUP, note=MARKUP, split=MARKUP), accuracy=dict(top1=1.0))
    run = Run(args=args, record=record, facts=facts, summary=summary(20.0))
    _, body = parts(str(make_card(MODEL, 'o/n', run, config=config_of(MODEL))))
    text = re.sub(r'```.*?```', '', body, flags=re.DOTALL)
    assert '&lt;script&gt;' in text
    assert '<script' not in text
    assert '\n# heading' not in body
    assert body.count('```') == str(make_card(MODEL, 'o/n', Run(args=ARGS), config=config_of(MODEL))).count('```') + 2
    table = [line for line in text.splitlines() if line.startswith('| ')]
    assert all(len(re.findall(r'(?<!\\)\|', line)) == 3 for line in table)


@pytest.mark.parametrize('count', [2, 4, 5, 6])
def test_no_top_5_for_five_classes_or_fewer(count):
    config = copy.deepcopy(config_of(MODEL))
    config['num_classes'] = config['pretrained_cfg']['num_classes'] = count
    run = Run(args=dict(ARGS, num_classes=count), summary=summary(20.0), facts=dict(dataset=DATASET, epoch=0))
    assert ('top-5' in str(make_card(MODEL, 'o/n', run, config=config)).lower()) == (count > 5)


@pytest.mark.parametrize(('args', 'start', 'hub'), [
    (dict(model='spa_resnet18.warm_a2_in1k', pretrained=True), 'spa_resnet18.warm_a2_in1k', 'timm/resnet18.a2_in1k'),
    (dict(model='spa_tf_efficientnet_lite0.grocery81', pretrained=True), 'spa_tf_efficientnet_lite0.grocery81', None),
    (dict(model='gated', model_kwargs=dict(base='resnet18.a3_in1k'), pretrained=True), 'resnet18.a3_in1k',
     'timm/resnet18.a3_in1k'),
    (dict(model='spa_resnet18'), None, None),
])
def test_start_weights(args, start, hub):
    name = args['model'].partition('.')[0]
    config = config_of('spa_resnet18' if name == 'gated' else name)
    if name == 'gated':
        config = dict(config, architecture='gated', model_args=args['model_kwargs'])
    metadata, body = parts(str(make_card(f'{name}.x', 'o/n', Run(args=args), config=config)))
    assert metadata.get('base_model') == hub
    assert (f'start weights: `{start}`' in body) == (start is not None)


def changed(config, **kwargs):
    config = copy.deepcopy(config)
    config['pretrained_cfg'].update(kwargs)
    return config


@pytest.mark.parametrize(('run', 'options', 'message'), [
    (Run(summary=summary(20.0)), dict(epoch=0), r'lacks 1 fact .*dataset.name \(.*top-1 is 20.0 %'),
    (Run(summary=summary(20.0), facts=dict(epoch=1)), dict(epoch=0), 'Conflicting epochs of the weights: 0 and 1'),
    (Run(summary=summary(20.0)), dict(epoch=7), 'from epoch 7, but summary.csv has no row'),
    (Run(facts=dict(accuracy=dict(top5=3.0), dataset=DATASET)), {}, 'lacks 1 fact .*: accuracy.top1 '),
    (Run(args=dict(ARGS, model='spa_resnet18')), {}, r'Conflicting architecture: .*spa_resnet18 \(args.yaml\)'),
    (Run(args=ARGS, record=dict(seed=43)), {}, r'Conflicting seed: 42 \(args.yaml\), 43 \(run.json\)'),
    (Run(args=dict(ARGS, num_classes=100)), {},
     r'Conflicting number of classes: 10 \(config.json\), 100 \(args.yaml\)'),
    (Run(args=dict(ARGS, initial_checkpoint='x.pth')), {}, "lacks 1 fact .*: base_model .*initial_checkpoint 'x.pth'"),
    (Run(facts=dict(widget=[dict(src='https://x/y.jpg', picture='y.jpg')])), {},
     'needs the weights to compute predictions'),
    (Run(), dict(config=changed(config_of(MODEL), license=None)),
     f'lacks 1 fact that the card of {MODEL} needs: license'),
])
def test_missing_or_conflicting_facts(run, options, message):
    with pytest.raises(PublishError, match=message):
        make_card(MODEL, 'o/n', run, **dict(dict(config=config_of(MODEL)), **options))


def test_comparison(tmp_path):
    for name, seed, *top1 in (
            (MODEL, 1, 70.0, 60.0), (MODEL, 2, 50.0, 64.0), ('preresnet18_cifar', 1, 20.0, 58.0),
            ('mobilenetv2_cifar', 1, 1.0, 2.0)):
        keep(tmp_path, dict(ARGS, model=name, seed=seed, experiment=f'{name}{seed}'), *top1)
    run = Run.read(tmp_path / f'{MODEL}-seed1')
    _, body = parts(str(make_card(MODEL, 'o/n', run, config=config_of(MODEL), results=tmp_path)))
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in body.splitlines() if 'preresnet18_cifar |' in line]
    assert rows == [
        ['preresnet18_cifar', '58.00', '78.00', '1', '11.17', '0.555'],
        [MODEL, '62.00 ± 2.83', '82.00 ± 2.83', '1, 2', '11.26', '0.557']]
    assert 'unknown spread' not in body


def test_gates_of_other_arguments_are_other_models(tmp_path):
    """Their accuracies are not averaged as seeds of one model."""
    for seed, kwargs, top1 in ((1, {}, 60.0), (2, {}, 62.0), (1, dict(pyramid_sizes=[1, 2]), 80.0)):
        shutil.move(keep(tmp_path, dict(ARGS, seed=seed, model_kwargs=kwargs), 1.0, top1), tmp_path / f'{top1}')
    run = Run.read(tmp_path / '60.0')
    _, body = parts(str(make_card(MODEL, 'o/n', run, config=config_of(MODEL), results=tmp_path)))
    rows = [line.split(' | ')[:2] for line in body.splitlines() if line.startswith(f'| {MODEL}')]
    assert rows == [[f'| {MODEL} pyramid_sizes=[1, 2]', '80.00'], [f'| {MODEL}', '61.00 ± 1.41']]


def test_cost_depends_on_the_image_size():
    costs = []
    for size in ([3, 32, 32], [3, 64, 64]):
        _, body = parts(str(make_card(MODEL, 'o/n', config=config_of(MODEL, input_size=size))))
        costs.append(float(re.search(r'GMACs \| ([\d.]+)', body)[1]))
    assert costs[1] == pytest.approx(4 * costs[0], rel=0.01)


def test_a_summary_without_the_first_epochs():
    run = Run(args=ARGS, summary=[dict(row, epoch=row['epoch'] + 5) for row in summary(20.0, 30.0, 29.0)],
              facts=dict(dataset=DATASET))
    body = str(make_card(MODEL, 'o/n', run, config=config_of(MODEL), epoch=6))
    assert 'after epoch 7 of 8' in body
    assert 'best of all epochs' not in body, 'earlier epochs may have been better'


def test_accuracy_of_other_weights_is_left_out():
    """timm measures the weights without averaging if the averaged weights are on the CPU."""
    args = dict(ARGS, model_ema=True, model_ema_force_cpu=True)
    run = Run(args=args, summary=summary(20.0, 31.0), facts=dict(dataset=DATASET))
    assert '31.0' not in str(make_card(MODEL, 'o/n', run, config=config_of(MODEL), epoch=1))
    run = Run(args=dict(args, model_ema_force_cpu=False), summary=summary(20.0, 31.0), facts=dict(dataset=DATASET))
    assert '31.0' in str(make_card(MODEL, 'o/n', run, config=config_of(MODEL), epoch=1))


@pytest.mark.parametrize('value', [float('nan'), 250., -3.])
@pytest.mark.parametrize('measured', [True, False])
def test_impossible_accuracies(value, measured):
    facts = dict(dataset=DATASET, epoch=0, **(dict(accuracy=dict(top1=value)) if measured else {}))
    file = 'card.yaml' if measured else 'summary.csv'
    with pytest.raises(PublishError, match=f'Invalid top-1 accuracy: .* Correct {file}'):
        make_card(MODEL, 'o/n', Run(summary=summary(value), facts=facts), config=config_of(MODEL))


@pytest.mark.parametrize(('command', 'shown'), [
    ('train --data-dir DATA \\\n    --lr 0.1\n', 'train --data-dir DATA --lr 0.1'),
    ("echo it is Ann's", "echo it is Ann's"),
    ("train --name 'a  b'", "train --name 'a  b'")])
def test_commands_are_unchanged(command, shown):
    run = Run(args=ARGS, facts=dict(commands=[command]))
    _, body = parts(str(make_card(MODEL, 'o/n', run, config=config_of(MODEL))))
    block = body.split('## Training')[1].split('```bash\n')[1].split('\n```')[0]
    assert ' '.join(block.split()) == ' '.join(shown.split())
    assert 'summary.csv' not in body, 'the run has no such file'


def test_runs_that_cannot_be_compared(tmp_path):
    run = Run.read(keep(tmp_path, ARGS, 1.0, 2.0))
    with pytest.raises(RunError, match='holds no results'):
        make_card(MODEL, 'o/n', run, config=config_of(MODEL), results=tmp_path / 'elsewhere')
    (tmp_path / 'nameless').mkdir()
    (tmp_path / 'nameless' / 'args.yaml').write_text('model: spa_resnet18')
    with pytest.raises(RunError, match=r'nameless/args.yaml does not set seed'):
        make_card(MODEL, 'o/n', run, config=config_of(MODEL), results=tmp_path)
    shutil.rmtree(tmp_path / 'nameless')
    other = keep(tmp_path, dict(ARGS, model='preresnet18_cifar', lr=0.2), 1.0, 2.0)
    with pytest.raises(RunError, match=r'lr \(0.2, expected 0.1\)'):
        make_card(MODEL, 'o/n', run, config=config_of(MODEL), results=tmp_path)
    shutil.rmtree(other)
    keep(tmp_path, dict(ARGS, model='preresnet18_cifar'), 1.0)
    with pytest.raises(RunError, match='ends with epoch 0 and .* with epoch 1'):
        make_card(MODEL, 'o/n', run, config=config_of(MODEL), results=tmp_path)


def test_widget_shows_predictions_of_the_weights(tmp_path):
    model = timm.create_model(MODEL, num_classes=3).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors')
    Image.new('RGB', (32, 32), (250, 120, 0)).save(tmp_path / 'orange.png')
    (tmp_path / 'card.yaml').write_text('widget: [{src: "https://example.org/orange.png", picture: orange.png}]')
    config = dict(config_of(MODEL), num_classes=3, label_names=['a', 'b', 'c'])
    card = make_card(MODEL, 'o/n', Run.read(tmp_path), config=config, weights=tmp_path / 'model.safetensors')
    (entry,) = parts(str(card))[0]['widget']
    pixels = torch.tensor([250, 120, 0])[:, None, None].expand(3, 32, 32) / 255
    mean, std = (torch.tensor(config['pretrained_cfg'][key])[:, None, None] for key in ('mean', 'std'))
    with torch.no_grad():
        expected = dict(zip('abc', model(((pixels - mean) / std)[None]).softmax(1)[0].tolist(), strict=True))
    assert entry['src'] == 'https://example.org/orange.png'
    assert {e['label']: e['score'] for e in entry['output']} == pytest.approx(expected, abs=1e-4)


def test_figures(tmp_path):
    """Figures are shown and copied with the card; other files are not."""
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'a.png').write_bytes(b'image')
    (tmp_path / 'b.png').write_bytes(b'private')
    name = CARDS[0].name
    shutil.copy(weights_of(CARDS[0]), folder / 'best.safetensors')

    def facts(**figure):
        (folder / 'card.yaml').write_text(yaml.safe_dump(dict(license='mit', figures=[figure])))

    facts(file='a.png', text='Gates [of] <b>one</b> block')
    write_repository(tmp_path / 'out', folder / 'best.safetensors', name)
    assert (tmp_path / 'out' / 'a.png').read_bytes() == b'image'
    shown = '![Gates (of) &lt;b&gt;one&lt;/b&gt; block](a.png)\n\nGates [of] &lt;b&gt;one&lt;/b&gt; block\n'
    assert shown in (tmp_path / 'out' / 'README.md').read_text()
    for figure in (dict(file='none.png'), dict(file='../b.png'), dict(file='card.yaml'), dict(text='x'), dict(file=3)):
        facts(**figure)
        with pytest.raises(PublishError, match="Invalid entry of 'figures' in card.yaml"):
            write_repository(tmp_path / 'other', folder / 'best.safetensors', name)
        assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize(('name', 'text', 'message'), [
    ('card.yaml', 'abuot: x', "unknown key 'abuot'"),
    ('card.yaml', 'about: [x]', "'about' must be a str"),
    ('card.yaml', 'training: 3', "'training' must be a str"),
    ('card.yaml', 'dataset: {nme: x}', 'got nme'),
    ('card.yaml', 'dataset: {name: [x]}', "'dataset: name' must be a text"),
    ('card.yaml', 'accuracy: {top1: best}', "'accuracy: top1' must be a number"),
    ('card.yaml', 'epoch: true', "'epoch' must be a int"),
    ('card.yaml', 'commands: x', "'commands' must be a list"),
    ('card.yaml', 'commands: [1]', "'an entry of commands' must be a str"),
    ('card.yaml', '- x', 'expected names with values, got a list'),
    ('card.yaml', 'about: "', 'cannot be read'),
    ('args.yaml', 'num_classes: ten', "'num_classes' must be a int"),
    ('args.yaml', 'input_size: 3', "'input_size' must be a list"),
    ('run.json', '{"versions": "2.6"}', "'versions' must be a dict"),
    ('run.json', '{"seconds": "one hour"}', "'seconds' must be a number"),
])
def test_an_invalid_file_of_a_run_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=re.escape(message)) as e:
        Run.read(tmp_path)
    assert name in str(e.value)


def test_arguments_that_timm_writes_as_null(tmp_path):
    (tmp_path / 'args.yaml').write_text('num_classes: null\nmean: null\nmodel_kwargs: {}\nopt_betas: [0.9, 0.999]\n')
    assert Run.read(tmp_path).args['num_classes'] is None


def test_command_line(tmp_path, capsys):
    folder = tmp_path / CARDS[0].name
    shutil.copytree(CARDS[0], folder)
    published = (folder / 'README.md').read_text()
    (folder / 'README.md').write_text('mine\n')
    sweep = ['--results', str(ROOT / 'train_scripts' / 'results' / 'tin200')]
    assert timm_spa_cli.main(['card', str(folder), *sweep]) == 0
    assert capsys.readouterr().out == published
    assert (folder / 'README.md').read_text() == 'mine\n', 'replaced only with --write'
    assert timm_spa_cli.main(['card', str(folder), *sweep, '--write']) == 0
    assert (folder / 'README.md').read_text() == published
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in CARDS[0].iterdir())
    capsys.readouterr()
    (folder / 'config.json').unlink()
    assert timm_spa_cli.main(['card', str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith('timm-spa: ')
    assert 'config.json cannot be read' in captured.err


@pytest.mark.parametrize('tag', ['tmm_mine', 'tmm_tin200'])
def test_the_card_is_reproduced_from_a_dry_run(tag, tmp_path, capsys):
    """For a registered tag and a new one."""
    run = tmp_path / 'run'
    run.mkdir()
    folder = ROOT / 'hub_cards' / 'spa_mobilenetv2_cifar.tmm_tin200'
    shutil.copy(weights_of(folder), run / 'best.safetensors')
    for name in ('args.yaml', 'summary.csv', 'run.json', 'card.yaml', 'scales.png'):
        shutil.copy(folder / name, run)
    with open(run / 'card.yaml', 'a') as f:
        f.write('license: mit\n')
    out = tmp_path / 'out'
    named = ['--model', f'spa_mobilenetv2_cifar.{tag}']
    assert timm_spa_cli.main(['publish', str(run / 'best.safetensors'), *named, '--dry-run', str(out)]) == 0
    capsys.readouterr()
    assert timm_spa_cli.main(['card', str(out)]) == 0
    assert capsys.readouterr().out == (out / 'README.md').read_text()
