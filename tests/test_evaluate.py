"""`train_scripts/evaluate.py`: its files match the predictions of each model."""
import argparse
import csv
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import yaml
from PIL import Image

import timm_spa

EVALUATE = Path(__file__).parent.parent / 'train_scripts' / 'evaluate.py'
LABELS = ['x', 'b', 'a']  # not in alphabetical order
MODELS = {'mobilenetv2_cifar-seed1': {}, 'spa_mobilenetv2_cifar-seed1': {}, 'gated-base=resnet18-gate=spa-seed1': dict(
    base='resnet18', gate='spa', neutral=False)}


@pytest.fixture
def sweep(tmp_path):
    """Three runs of one epoch, and five test images."""
    generator = torch.Generator().manual_seed(0)
    for i, label in enumerate('aabbx'):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        (tmp_path / 'data' / 'test' / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / 'data' / 'test' / label / f'{i}.png')
    (tmp_path / 'classes.txt').write_text('\n'.join(LABELS))
    for name, kwargs in MODELS.items():
        architecture = name.partition('-')[0]
        args = dict(
            model=architecture, model_kwargs=kwargs, num_classes=3, epochs=1, crop_pct=1.0, input_size=[3, 32, 32],
            interpolation='bilinear')
        results, run = tmp_path / 'results' / name, tmp_path / 'runs' / name
        results.mkdir(parents=True)
        run.mkdir(parents=True)
        (results / 'args.yaml').write_text(yaml.safe_dump(args))
        (results / 'run.json').write_text(json.dumps(dict(model=architecture)))
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=3, **kwargs)
        for module in model.modules():
            if isinstance(module, timm_spa.SpatialPyramidAttention):
                nn.init.normal_(module.pyramid_weight)
        torch.save(
            dict(epoch=0, state_dict=model.state_dict(), args=argparse.Namespace(**args)), run / 'last.pth.tar')
    return tmp_path


def evaluate(folder, *more):
    return runpy.run_path(str(EVALUATE))['main']([
        str(folder / 'results'), '--runs', str(folder / 'runs'), '--data-dir', str(folder / 'data'), '--split', 'test',
        '--class-map', str(folder / 'classes.txt'), '--workers', '0', *more])


def rows_of(path):
    with open(path, newline='') as f:
        return list(csv.reader(f))


def test_predictions_and_pyramid_weights(sweep, capsys):
    assert evaluate(sweep) == 0
    printed = capsys.readouterr().out
    for name in MODELS:
        checkpoint = torch.load(sweep / 'runs' / name / 'last.pth.tar', weights_only=False)
        args = checkpoint['args']
        model = timm.create_model(args.model, num_classes=3, **args.model_kwargs).eval()
        model.load_state_dict(checkpoint['state_dict'])
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
        expected = [['target', 'predicted']]
        for path in sorted((sweep / 'data').rglob('*.png')):
            with Image.open(path) as image:
                pixels = torch.tensor(list(image.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
            with torch.no_grad():
                predicted = model(((pixels - mean) / std)[None]).argmax().item()
            expected.append([str(LABELS.index(path.parent.name)), str(predicted)])
        assert rows_of(sweep / 'results' / name / 'test.csv') == expected
        assert f'{name}: {sum(t == p for t, p in expected[1:])} of 5 correct' in printed
        weights = sweep / 'results' / name / 'pyramid_weights.csv'
        gates = [m for m in model.modules() if isinstance(m, timm_spa.SpatialPyramidAttention)]
        assert weights.exists() == bool(gates)
        if gates:
            _, *body = rows_of(weights)
            assert [float(v) for row in body for v in row[1:]] == pytest.approx(
                [v for gate in gates for v in gate.pyramid_weight.tolist()], abs=1e-5)


def test_runs_that_cannot_be_compared(sweep, capsys):
    args = yaml.safe_load((sweep / 'results' / 'mobilenetv2_cifar-seed1' / 'args.yaml').read_text())
    (sweep / 'results' / 'mobilenetv2_cifar-seed1' / 'args.yaml').write_text(yaml.safe_dump(dict(args, crop_pct=0.5)))
    with pytest.raises(SystemExit, match='2'):
        evaluate(sweep)
    assert 'The runs have different preprocessing' in capsys.readouterr().err
    (sweep / 'results' / 'mobilenetv2_cifar-seed1' / 'args.yaml').write_text(yaml.safe_dump(dict(args, epochs=2)))
    assert evaluate(sweep) == 1
    message = 'mobilenetv2_cifar-seed1 is incomplete: its last checkpoint is of epoch 0, expected 1'
    assert message in capsys.readouterr().err
    assert not list((sweep / 'results').rglob('test.csv'))


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--split', 'tset'], "Split 'tset' not found in .* Set --split to one of test"),
    (['--class-map', 'nowhere.txt'], 'Check --data-dir and --class-map'),
    (['--data-dir', 'fewer', '--class-map', ''], 'has 2 classes, but the models have 3 outputs. .*--class-map FILE')])
def test_data_with_other_classes(sweep, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(sweep)
    shutil.copytree(sweep / 'data', sweep / 'fewer')
    shutil.rmtree(sweep / 'fewer' / 'test' / 'x')
    with pytest.raises(SystemExit, match='2'):
        evaluate(sweep, *arguments)
    assert re.search(message, capsys.readouterr().err)
    assert not list((sweep / 'results').rglob('test.csv'))
