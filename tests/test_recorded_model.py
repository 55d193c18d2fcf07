"""Commands find out which model a checkpoint is of; --model-kwargs says it where nothing else does."""
import json
import re
import shlex

import pytest
import timm
import torch
import yaml
from marks import slow_unless
from test_save import attached
from timm.models import save_for_hf

import timm_spa
import timm_spa_cli
from timm_spa.checkpoints.config_file import NOT_OF_A_MODEL
from timm_spa.checkpoints.reading import CheckpointError
from timm_spa.checkpoints.run_files import RunError
from timm_spa.hub.convert import convert
from timm_spa.hub.verify import verify
from timm_spa.models._likely_model import likely_model
from timm_spa.predict import ModelError, load_model, sample_image

COFFEE = str(sample_image('coffee'))
GATED = dict(base='resnet10t', gate='se')


@pytest.fixture(scope='module')
def network():
    return attached('resnet10t', 'se', dict(num_classes=3))


def bare(folder, network):
    torch.save(network.state_dict(), folder / 'w.pth')
    return folder / 'w.pth', [
        '--model', 'gated', '--model-kwargs', 'base=resnet10t', 'gate=se', '--num-classes', '3']


def with_arguments(folder, network):
    torch.save(network.state_dict(), folder / 'w.pth')
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(model='gated', num_classes=3, model_kwargs=GATED)))
    return folder / 'w.pth', []


def saved(folder, network):
    timm_spa.save_pretrained(network, folder, ['ant', 'bee', 'cat'])
    return folder / 'model.safetensors', []


def saved_by_timm(folder, network):
    save_for_hf(network, folder, safe_serialization=True)
    return folder / 'model.safetensors', []


WRITERS = [bare, with_arguments, saved, saved_by_timm]


@pytest.mark.quick(2)
@pytest.mark.parametrize('write', WRITERS, ids=lambda write: write.__name__)
@torch.no_grad()
def test_every_command(write, network, tmp_path, capsys):
    source, options = write(tmp_path, network)
    x = torch.randn(2, 3, 64, 64)
    expected = network(x)

    def run(command):
        assert timm_spa_cli.main([*map(str, command), *options]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    classes = json.loads(run(['predict', COFFEE, '--checkpoint', source, '--json']))[0]['classes']
    assert {c['name'] for c in classes} == (
        {'ant', 'bee', 'cat'} if write is saved else {'class 0', 'class 1', 'class 2'})
    assert str(source) in run(['explain', 'cam', COFFEE, '--checkpoint', source])
    run(['export', source, tmp_path / 'model.pt2', '--to', 'torch-export', '--built', '--img-size', 64] if not options
        else ['export', tmp_path / 'model.pt2', '--to', 'torch-export', '--built', '--img-size', 64,
              '--checkpoint', source])
    (tmp_path / 'card.yaml').write_text('license: mit\n')
    own, options = options, [o.replace('gated', 'gated.mine') for o in options]
    run(['publish', source, '--dry-run', tmp_path / 'out'])
    options = []
    run(['verify', tmp_path / 'out'])
    published = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert torch.equal(published(x), expected)
    assert published.pretrained_cfg.get('label_names') == (['ant', 'bee', 'cat'] if write is saved else None)
    options = [o for o in own if o not in ('--num-classes', '3')]
    run(['convert', source, tmp_path / 'converted.safetensors'])
    options = []
    (tmp_path / 'args.yaml').unlink(missing_ok=True)
    (tmp_path / 'config.json').unlink(missing_ok=True)
    classes = json.loads(run(
        ['predict', COFFEE, '--checkpoint', tmp_path / 'converted.safetensors', '--num-classes', 3, '--json']))
    assert len(classes[0]['classes']) == 3


def test_arguments_that_contradict_the_record(network, tmp_path):
    file, _ = saved(tmp_path, network)
    for kwargs in (dict(base='resnet18'), dict(gate='se', pyramid_sizes=(1, 2))):
        with pytest.raises(RunError, match=r'contains weights of gated with the arguments .*, but --model-kwargs has'):
            load_model(None, file, model_kwargs=kwargs)
    assert load_model(None, file, model_kwargs=dict(gate='se')).num_classes == 3
    with pytest.raises(CheckpointError, match='contains weights of gated base=.* not of gated base="resnet18'):
        convert(file, tmp_path / 'o.safetensors', 'gated', base='resnet18')
    for key in ('pretrained', 'checkpoint_path'):
        assert key in NOT_OF_A_MODEL
        with pytest.raises(ModelError, match=f'The model arguments {key} cannot be set'):
            load_model('resnet18', model_kwargs={key: 'x'})
    report = verify(tmp_path, model_kwargs=dict(gate='se', rd_ratio=0.5))
    assert 'config.json should have rd_ratio=0.5 in model_args, got 0.0625' in report.problems


def test_options_of_the_command_line(network, tmp_path, capsys):
    file, _ = bare(tmp_path, network)
    assert timm_spa_cli.main(['predict', COFFEE, '--checkpoint', str(file), '--model-kwargs', 'gate']) == 1
    assert 'takes KEY=VALUE, got gate' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main(['predict', COFFEE, '--model-kwargs', 'gate=se'])
    assert '--model-kwargs needs --checkpoint or a model' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        timm_spa_cli.main(['publish', str(file)])
    assert '--model, --repo and --dry-run' in capsys.readouterr().err
    assert timm_spa_cli.main(['convert', str(file), str(tmp_path / 'o.safetensors')]) == 1
    assert '--model gated --model-kwargs base=resnet10t gate=se' in capsys.readouterr().err


def test_published_weights_with_arguments(tmp_path):
    """Arguments of a model by name are handed on, and its weights are loaded strictly."""
    name = 'spa_tf_efficientnet_lite0.grocery81'
    assert load_model(name, model_kwargs=dict(drop_path_rate=0.1)).num_classes == 81
    with pytest.raises(RuntimeError, match='does not fit'):
        load_model(name, model_kwargs=dict(rd_ratio=0.5))


LIKELY = {  # the model, options that the sentence names, and models that were asked for
    'resnet18 spa': (dict(), '--model gated --model-kwargs base=resnet18 gate=spa', 'resnet18'),
    'resnet34 se': (dict(), '--model gated --model-kwargs base=resnet34 gate=se', 'resnet50'),
    'mobilenetv3_small_050 cbam': (dict(), 'base=mobilenetv3_small_050 gate=cbam', ''),
    'densenet121 gc': (dict(), 'base=densenet121 gate=gc', ''),
    'resnet10t spa': (dict(rd_ratio=1 / 8), 'base=resnet10t gate=spa rd_ratio=0.125', ''),
    'resnet10t se': (dict(rd_ratio=1 / 8), 'base=resnet10t gate=se rd_ratio=0.125', ''),
    'resnet26 spa': (
        dict(where=['layer4.0', 'layer4.1'], pyramid_sizes=(1, 2)),
        '''base=resnet26 gate=spa where="('layer4.0.bn3','layer4.1.bn3',)" pyramid_sizes=..., which are 2 numbers''',
        'spa_resnet26'),
}


@pytest.mark.parametrize('case', slow_unless({'resnet18 spa', 'resnet10t se', 'resnet26 spa'}.__contains__, LIKELY))
def test_likely_model(case):
    arguments, options, asked = LIKELY[case]
    base, gate = case.split()
    model = timm_spa.add_attention(timm.create_model(base, num_classes=7, in_chans=1), gate, **arguments)
    sentence = likely_model(model.state_dict(), asked)
    assert sentence == f'Its tensors are probably those of gated: choose it with {sentence.partition("with ")[2]}'
    assert sentence.removesuffix('.').endswith(options)
    if 'which' not in options:  # the options are those of timm's scripts
        words = shlex.split(sentence.removesuffix('.').partition('--model-kwargs ')[2])
        again = timm.create_model('gated', num_classes=7, in_chans=1, **parsed(words))
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()}


def parsed(words):
    from timm_spa.benchmark_worker import parse_model

    return parse_model(shlex.join(['gated', *words]))[1]


def test_likely_model_of_other_tensors():
    spa = timm.create_model('spa_resnet18', num_classes=7).state_dict()
    assert likely_model(spa, 'resnet18').endswith('choose it with --model spa_resnet18.')
    assert likely_model(spa, 'spa_resnet18') == ''
    assert likely_model(timm.create_model('resnet10t').state_dict(), 'spa_resnet18') == ''
    assert likely_model({}) == likely_model({'a.attn.qkv.weight': torch.zeros(3)}) == ''
    own = timm_spa.add_attention(torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32)), where='1')
    assert 'base=NAME gate=spa' in likely_model(own.state_dict())


def test_messages_name_the_likely_model(network, tmp_path, capsys):
    file, _ = bare(tmp_path, network)
    expected = 'choose it with --model gated --model-kwargs base=resnet10t gate=se'
    with pytest.raises(RunError, match=f'The model of .* is unknown: .*{expected}'):
        load_model(None, file)
    with pytest.raises(CheckpointError, match=f'does not fit ResNet; tensors .*{expected}'):
        load_model('resnet10t', file, 3)
    (tmp_path / 'card.yaml').write_text('license: mit\n')
    options = ['--model', 'resnet10t.mine', '--num-classes', '3', '--dry-run', str(tmp_path / 'o')]
    assert timm_spa_cli.main(['publish', str(file), *options]) == 1
    assert expected in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=f'does not fit resnet10t. Compared .*{expected}'):
        convert(file, tmp_path / 'o.safetensors', 'resnet10t')
    with pytest.raises(RuntimeError, match=f'does not fit gated; tensors .*{expected}'):
        timm.create_model('gated', base='resnet10t', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    timm_spa.save_pretrained(network, tmp_path / 'saved')
    config = tmp_path / 'saved' / 'config.json'
    config.write_text(config.read_text().replace('"gate": "se"', '"gate": "spa"'))
    problems = verify(tmp_path / 'saved').problems
    assert any(re.search('does not fit gated; tensors', problem) for problem in problems)
    assert problems[-1].endswith(expected)
