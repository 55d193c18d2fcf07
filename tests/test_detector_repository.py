"""Hub repositories of detectors: files, card, upload, download and checks."""
import json
import re
import shutil

import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import timm_spa_cli
from timm_spa.detection import DetectionError, load_detector, retinanet, save_detector
from timm_spa.detection.repository import check_detector, write_detector_repository
from timm_spa.hub.card import CardError
from timm_spa.hub.publish import PublishError
from timm_spa.hub.verify import verify

REPO = 'org/finds-things'
CATEGORIES = [dict(id=3, name='cat'), dict(id=7, name='dog | <b>')]
ROWS = 'epoch,train_loss,eval_map,eval_ap50,eval_ap75,lr\n0,1.5,10.5,20.0,9.0,0.01\n1,1.2,8.5,18.0,7.0,0.01\n'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder of a run as `timm-spa detect train` writes it, with a card.yaml."""
    run = tmp_path_factory.mktemp('trained') / 'run'
    torch.manual_seed(0)
    model = retinanet('spa_mobilenetv2_050', 2, pretrained_backbone=False, min_size=64, max_size=64)
    for name in ('best', 'last'):
        save_detector(model, run / name, CATEGORIES)
    (run / 'summary.csv').write_text(ROWS)
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(
        detector='retinanet', model='spa_mobilenetv2_050', settings=dict(epochs=2, lr=0.01))))
    (run / 'card.yaml').write_text(yaml.safe_dump(dict(license='mit', dataset=dict(name='Pets', split='val'))))
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


@pytest.mark.parametrize(('which', 'ap', 'epochs'), [('best', 10.5, 1), ('last', 8.5, 2)])
def test_card_states_the_epoch_of_the_checkpoint(run, tmp_path, which, ap, epochs):
    write_detector_repository(tmp_path / 'out', run / which, REPO)
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    assert card.data.license == 'mit'
    assert card.data.pipeline_tag == 'object-detection'
    assert [(e.metric_name, e.metric_value) for e in card.data.eval_results][0] == ('AP', ap)
    assert f'AP {ap}' in card.text
    assert f'after {epochs} epochs.' in card.text
    assert 'Classes: cat, dog \\| &lt;b&gt;.' in card.text
    assert '- lr: 0.01' in card.text
    written = tmp_path / 'again'
    write_detector_repository(written, tmp_path / 'out', REPO)  # from the folder alone
    assert (written / 'README.md').read_text() == (tmp_path / 'out' / 'README.md').read_text()


def test_publish_and_use(run, tmp_path, hub, owner, capsys, monkeypatch):
    assert timm_spa_cli.main(['publish', str(run / 'best'), '--repo', REPO]) == 0
    assert f'Published: {hub.url}/{REPO}/commit/' in capsys.readouterr().out
    assert set(hub.files(REPO)) - {'.gitattributes'} == {
        'README.md', 'args.yaml', 'config.json', 'model.safetensors', 'summary.csv'}
    assert timm_spa_cli.main(['publish', str(run / 'best'), '--repo', REPO]) == 0
    assert 'Nothing to change' in capsys.readouterr().out
    assert timm_spa_cli.main(['verify', REPO]) == 0
    output = capsys.readouterr().out
    assert 'files against the digests of the Hub' in output
    assert 'No problem found.' in output

    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (90, 70), 'green').save('street.jpg')
    shell, code = re.findall(r'```(?:bash|python)\n(.*?)```', hub.files(REPO)['README.md'].decode(), re.S)
    loaded = load_detector(f'hf-hub:{REPO}')
    expected = load_detector(run / 'best').state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.categories == CATEGORIES
    exec(code, {})
    command = shell.splitlines()[-1].split()
    assert command[:2] == ['timm-spa', 'detect']
    assert timm_spa_cli.main(command[1:]) == 0
    assert sorted(p.name for p in (tmp_path / 'detections').iterdir()) == ['finds-things.json', 'street-boxes.png']
    with pytest.raises(DetectionError, match='org/none cannot be downloaded from http'):
        load_detector('hf-hub:org/none')


@pytest.mark.parametrize(('change', 'error', 'message'), [
    (lambda run: (run / 'card.yaml').unlink(), CardError,
     'lacks 2 facts that the card of the detector needs: license .*dataset.name'),
    (lambda run: (run / 'card.yaml').write_text('license: mit\n'), CardError,
     'lacks 1 fact .*: dataset.name .*AP is 10.5'),
    (lambda run: (run / 'args.yaml').write_text('model_kwargs: {x: hf_' + 'a' * 30 + '}'), PublishError, 'a token'),
    (lambda run: (run / 'best' / 'config.json').write_text('{}'), DetectionError, 'does not describe a detector'),
])
def test_missing_and_invalid_files(run, tmp_path, change, error, message):
    change(run)
    with pytest.raises(error, match=message):
        write_detector_repository(tmp_path / 'out', run / 'best')
    assert not (tmp_path / 'out').exists()


def change_weights(folder, change):
    path = folder / 'model.safetensors'
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata=dict(format='pt'))


def change_config(folder, **fields):
    path = folder / 'config.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **fields)))


NORM = 'backbone.body.bn1.running_var'


@pytest.mark.quick(5)
@pytest.mark.parametrize(('change', 'problem'), [
    (lambda f: change_weights(f, lambda t: t[NORM].fill_(float('nan'))), 'not finite'),
    (lambda f: change_weights(f, lambda t: t.pop(NORM)), NORM),
    (lambda f: (f / 'model.safetensors').unlink(), 'model.safetensors is missing'),
    (lambda f: (f / 'README.md').unlink(), 'README.md is missing'),
    (lambda f: (f / 'weights.bin').write_bytes(b'\x80\x04'), 'weights.bin is a pickle'),
    (lambda f: change_config(f, backbone='spa_resnet51'), 'spa_resnet51'),
    (lambda f: change_config(f, backbone_kwargs=dict(checkpoint_path='x.pth')),
     'checkpoint_path is not allowed in a checkpoint'),
    (lambda f: change_config(f, min_size='a'), 'min_size must be a whole number from 1 to 4096'),
    (lambda f: change_config(f, max_size=100_000), 'max_size must be a whole number from 1 to 8192'),
    (lambda f: change_config(f, num_classes=5), '2 categories for 5 classes'),
    (lambda f: change_config(f, image_mean=['a', 'b', 'c']), 'image_mean must be three numbers'),
])
def test_verify_reports_and_never_raises(run, tmp_path, change, problem):
    write_detector_repository(tmp_path / 'out', run / 'best', REPO)
    assert verify(tmp_path / 'out', check_detector=check_detector).problems == []
    change(tmp_path / 'out')
    report = verify(tmp_path / 'out', check_detector=check_detector)
    assert any(problem in line for line in report.problems), report.problems


@pytest.mark.parametrize('arguments', [
    ['--model', 'spa_resnet50.x', '--repo', REPO], ['--num-classes', '3', '--repo', REPO], []])
def test_arguments_that_a_detector_does_not_take(run, arguments, capsys):
    with pytest.raises(SystemExit):
        timm_spa_cli.main(['publish', str(run / 'best'), *arguments])
    assert 'detector' in capsys.readouterr().err
