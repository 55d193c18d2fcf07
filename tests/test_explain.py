"""Gates, pyramid weights, ablation and curves, as numbers and figures."""
import copy
import csv
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from timm.utils import reparameterize_model

import timm_spa
import timm_spa_cli
from timm_spa.checkpoints.run_files import RunError
from timm_spa.explain import ExplainError, ScaleWeights, ablate, figures, gate_maps, neutral_gates, scale_weights
from timm_spa.explain.curves import read_curves
from timm_spa.predict import load_model, sample_image

IMAGE = str(sample_image('coffee'))
MODELS = ('spa_resnet18', 'spa_b_resnet18', 'spa_c_resnet18', 'spa_mobilenetv2_cifar', 'spa_densenet_cifar', 'gated')


def make(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **(dict(base='regnety_002', neutral=False) if name == 'gated' else {}))
    for module in model.modules():
        if isinstance(module, timm_spa.SpatialPyramidAttention):
            nn.init.normal_(module.pyramid_weight, 1.)
    size = model.pretrained_cfg['input_size'][-1]
    return model, torch.randn(2, 3, min(size, 64), min(size, 64))


@pytest.mark.parametrize('name', MODELS)
def test_gates_multiply_the_feature_map(name):
    """The output of the layer is its input multiplied by the enlarged gate."""
    model, x = make(name)
    model.eval()
    recorded = {}
    for n, m in model.named_modules():
        if isinstance(m, timm_spa.SpatialPyramidAttention):
            m.register_forward_hook(lambda m, args, out, n=n: recorded.update({n: (args[0].clone(), out.clone())}))
    gates = gate_maps(model, x)
    assert len(gates) == len(recorded) > 3
    for (block, gate), (n, (before, after)) in zip(gates.items(), recorded.items(), strict=True):
        assert n in (f'{block}.attn', f'{block}.drop.attn')
        size = gate.shape[-1]
        assert gate.shape == (2, before.shape[1], size, size)
        enlarged = F.interpolate(gate, size=before.shape[-2:], mode='nearest')
        torch.testing.assert_close(before * enlarged, after)


@pytest.mark.parametrize('name', ['spa_resnet18', 'spa_mobilenetv2_cifar'])
def test_fused_models_have_the_same_gates(name):
    model, x = make(name)
    model.eval()
    expected, weights = gate_maps(model, x), scale_weights(model)
    fused = reparameterize_model(model)
    assert scale_weights(fused) == weights
    for (block, gate), (other, same) in zip(expected.items(), gate_maps(fused, x).items(), strict=True):
        assert block == other
        torch.testing.assert_close(gate, same, rtol=1e-4, atol=1e-5)


def test_a_pyramid_of_one_cell_has_gates_when_fused():
    torch.manual_seed(0)
    model = timm.create_model('spa_resnet18', pyramid_sizes=(1,)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = gate_maps(model, x)
    for (block, gate), (other, same) in zip(
            expected.items(), gate_maps(reparameterize_model(model), x).items(), strict=True):
        assert block == other
        torch.testing.assert_close(gate, same, rtol=1e-4, atol=1e-5)


def state_of(model):
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return hooks, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], {
        k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize('fails', [False, True])
def test_the_model_is_unchanged(fails):
    model, x = make('spa_resnet18')
    model.train()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    before = state_of(model)
    images = x[:, :1] if fails else x
    for call in (lambda: gate_maps(model, images), lambda: ablate(model, [(images, torch.zeros(2))])):
        if fails:
            with pytest.raises(RuntimeError):
                call()
        else:
            call()
        after = state_of(model)
        assert after[:3] == before[:3]
        assert all(torch.equal(a, b) for a, b in zip(after[3].values(), before[3].values(), strict=True))


def test_scale_weights():
    model, _ = make('spa_resnet18')
    weights = scale_weights(model)
    assert list(weights) == [f'layer{i}.{j}' for i in (1, 2, 3, 4) for j in (0, 1)]
    assert weights['layer3.1'].sizes == (7, 4, 1)
    assert weights['layer3.1'].weights == pytest.approx(model.layer3[1].attn.pyramid_weight.tolist())


def test_neutral_gates():
    """With all gates at 1/2, a warm-started model computes the same as the plain model, whatever it has learned."""
    plain = timm.create_model('resnet18', zero_init_last=False).eval()
    model = timm_spa.add_attention(copy.deepcopy(plain)).eval()
    gates = [m for m in model.modules() if isinstance(m, timm_spa.SpatialPyramidAttention)]
    for gate in gates:
        nn.init.normal_(gate.fc2.weight)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x), atol=1e-3)
        with neutral_gates(model):
            torch.testing.assert_close(model(x), plain(x))
        block = next(iter(gate_maps(model, x)))
        learned = model(x)
        with neutral_gates(model, [block]):
            one = model(x)
        nn.init.zeros_(gates[0].fc2.weight)
        torch.testing.assert_close(model(x), one)
        assert not torch.allclose(one, learned)


def test_ablate():
    model, x = make('spa_mobilenetv2_cifar')
    model.eval()
    with torch.no_grad():
        target = model(x).argmax(-1)
    results = ablate(model, [(x, target), (x, (target + 1) % 100)])
    blocks = list(gate_maps(model, x))
    assert list(results) == ['', *blocks, '*']
    assert results[''] == (2, 4)
    for name in (*blocks, '*'):
        with torch.no_grad(), neutral_gates(model, None if name == '*' else [name]):
            answers = model(x).argmax(-1)
        assert results[name] == ((answers == target).sum() + (answers == (target + 1) % 100).sum(), 4)


def test_models_that_cannot_be_explained():
    x = torch.randn(1, 3, 64, 64)
    for name in ('resnet18', 'seresnet18', 'se_preresnet18_cifar'):
        for model in (timm.create_model(name).eval(), reparameterize_model(timm.create_model(name).eval())):
            with pytest.raises(ExplainError, match='ResNet cannot be explained: it does not contain Spatial Pyra'):
                gate_maps(model, x)
    model, _ = make('spa_resnet18')
    with pytest.raises(ExplainError, match="'layer9' is not a gated block .* Choose from layer1.0, layer1.1,"):
        gate_maps(model, x, ['layer9'])
    with pytest.raises(ExplainError, match='compiled'):
        gate_maps(torch.compile(model), x)


def explain(*arguments):
    return timm_spa_cli.main(['explain', *map(str, arguments)])


def test_gates_by_command(tmp_path, capsys):
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'not an image')
    blocks = ['--blocks', 'blocks.0.0', 'blocks.5.0']
    for folder in ('a', 'b'):
        assert explain('gates', IMAGE, broken, *blocks, '--out', tmp_path / folder) == 1
    captured = capsys.readouterr()
    assert 'broken.jpg could not be read' in captured.err
    files = sorted(path.name for path in (tmp_path / 'a').iterdir())
    assert files == ['coffee-gates.csv', 'coffee-gates.png', 'coffee-gates.svg']
    for name in files:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes(), 'the same bytes'
    with Image.open(tmp_path / 'a' / 'coffee-gates.png') as image:
        assert image.width == 420, 'two columns'
        assert len(image.convert('RGB').getcolors(1 << 24)) > 50
    with open(tmp_path / 'a' / 'coffee-gates.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert explain('gates', IMAGE, *blocks, '--json') == 0
    (printed,) = json.loads(capsys.readouterr().out).values()
    for record, row in zip(printed, rows, strict=True):
        for name, text in row.items():
            if name not in ('block', 'cells'):
                assert isinstance(record[name], (int, float)), 'JSON has numbers as numbers'
                assert record[name] == pytest.approx(float(text), abs=1e-4)
    model = load_model('spa_tf_efficientnet_lite0.grocery81')
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with Image.open(IMAGE) as image:
        gates = gate_maps(model, transform(image.convert('RGB'))[None])
    assert [row['block'] for row in rows] == blocks[1:]
    for row in rows:
        gate = gates[row['block']]
        assert float(row['mean distance from 1/2']) == pytest.approx((gate - 0.5).abs().mean().item(), abs=1e-4)


def test_scales_by_command(tmp_path, capsys):
    shipped = ['spa_tf_efficientnet_lite0.grocery81', 'spa_mobilenetv2_cifar.tmm_tin200']
    options = [word for name in shipped for word in ('--model', name)]
    assert explain('scales', *options, '--out', tmp_path) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.csv', '.png', '.svg']
    assert (tmp_path / 'scales.png').read_bytes().startswith(b'\x89PNG')
    assert capsys.readouterr().out.endswith(f'Wrote {tmp_path}: scales.csv, scales.png, scales.svg.\n')
    assert explain('scales', *options, '--json') == 0
    printed = json.loads(capsys.readouterr().out)
    for name in shipped:
        weights = scale_weights(timm.create_model(name, pretrained=True))
        assert [row['block'] for row in printed[name]] == list(weights)
        for row, scales in zip(printed[name], weights.values(), strict=True):
            assert [value for key, value in row.items() if key != 'block'] == pytest.approx(scales.weights, abs=1e-4)


def test_images_with_the_same_name(tmp_path):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'x.jpg').write_bytes(Path(IMAGE).read_bytes())
    assert explain(
        'gates', tmp_path / 'a' / 'x.jpg', tmp_path / 'b' / 'x.jpg', '--blocks', 'blocks.6.0', '--out', tmp_path) == 0
    assert sorted(path.name for path in tmp_path.glob('*.csv')) == ['x-1-gates.csv', 'x-2-gates.csv']


def test_curves_by_command(tmp_path, capsys):
    for seed, shift in (('41', 0), ('42', 2)):
        for name, kwargs in (('spa_resnet18', {}), ('gated', dict(base='resnet18'))):
            run = tmp_path / 'runs' / f'{name}-seed{seed}'
            run.mkdir(parents=True)
            (run / 'args.yaml').write_text(json.dumps(dict(model=name, model_kwargs=kwargs)))
            epochs = [f'{i},{3 - i},{4 - i},{10 * i + shift},0' for i in range(3 if shift else 4)]
            (run / 'summary.csv').write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1,eval_top5', *epochs]))
    bare = tmp_path / 'mine-seed7'
    bare.mkdir()
    (bare / 'summary.csv').write_bytes((run / 'summary.csv').read_bytes())
    for folder in ('a', 'b'):
        assert explain('curves', tmp_path / 'runs', bare, '--out', tmp_path / folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split('  +', line) for line in lines[1:4]] == [
        ['gated base=resnet18', '2', '3', '1.000', '2.000', '21.000'],
        ['spa_resnet18', '2', '3', '1.000', '2.000', '21.000'], ['mine', '1', '3', '1.000', '2.000', '22.000']]
    for suffix in ('csv', 'png', 'svg'):
        assert (tmp_path / 'a' / f'curves.{suffix}').read_bytes() == (tmp_path / 'b' / f'curves.{suffix}').read_bytes()
    assert explain('curves', bare, '--json') == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        'trained': 'mine', 'run': 1, 'epoch': 1, 'train_loss': 2, 'eval_loss': 3, 'eval_top1': 12}
    assert explain('curves', tmp_path / 'none') == 1
    assert 'none does not contain a training run: summary.csv was not found' in capsys.readouterr().err
    (bare / 'summary.csv').write_text('epoch,eval_top1\n0,1\n')
    assert explain('curves', bare) == 1
    assert 'summary.csv cannot be drawn: the column train_loss is missing' in capsys.readouterr().err


def test_runs_with_different_settings_are_not_averaged(tmp_path):
    """The label of a group contains the settings in which the groups differ."""
    def write(name, **args):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'args.yaml').write_text(json.dumps(dict(model='spa_resnet18', workers=len(name), **args)))
        metrics = 'eval_map,eval_ap50' if 'detector' in args else 'eval_loss,eval_top1'
        (tmp_path / name / 'summary.csv').write_text(f'epoch,train_loss,{metrics}\n0,1,2,3\n')

    for name, seed, kwargs in (('a', 1, {}), ('b', 2, None), ('c', 1, {})):
        write(name, seed=seed, model_kwargs=kwargs, lr=0.2 if name == 'c' else 0.1, output=name)
    groups = read_curves([tmp_path / name for name in 'abc'])
    assert {label: len(runs) for label, runs in groups.items()} == {'spa_resnet18 lr=0.1': 2, 'spa_resnet18 lr=0.2': 1}
    assert list(read_curves([tmp_path / 'a', tmp_path / 'b'])) == ['spa_resnet18']
    for name, seed, size in (('d', 1, 64), ('e', 2, 64), ('f', 1, 96)):
        write(name, detector='retinanet', config=dict(min_size=size), settings=dict(seed=seed, lr=0.1))
    groups = read_curves([tmp_path / name for name in 'def'])
    assert {label: len(runs) for label, runs in groups.items()} == {
        'retinanet spa_resnet18 min_size=64': 2, 'retinanet spa_resnet18 min_size=96': 1}


def test_mean_and_band_of_the_curves():
    """The lines and the band in the figure of matplotlib."""
    runs = [[dict(epoch=i, train_loss=a + i, eval_loss=1, eval_top1=2) for i in range(3)] for a in (1, 2, 6)]
    figure = figures.draw_curves({'model': {'SPA-A': runs, 'none': runs[:1]}})
    first = figure.axes[0]
    assert first.lines[0].get_xydata().tolist() == [[1, 3], [2, 4], [3, 5]]
    band = first.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 8)
    assert len(first.collections) == 1, 'no band around a single run'


def test_gates_of_a_figure_have_one_range_of_colours():
    """A deviation of 0.0005 from 1/2 looks neutral, next to large deviations and alone."""
    flat, varied = torch.full((3, 7, 7), 0.5), torch.full((3, 7, 7), 0.5)
    flat[0, 0, 0] += 0.0005
    varied[1, 2, 2] -= 0.2
    for gates, reach in ((dict(a=flat, b=varied), 0.2), (dict(a=flat), 0.01)):
        figure = figures.draw_gates(Image.new('RGB', (64, 64)), gates)
        limits = {axis.images[1].get_clim() for axis in figure.axes if axis.images}
        assert len(limits) == 1
        assert limits.pop() == pytest.approx((0.5 - reach, 0.5 + reach))
        legend = ' '.join(figure.get_suptitle().split())
        assert f'violet: above 1/2, up to {0.5 + reach:.2f}; orange: below 1/2, down to {0.5 - reach:.2f}' in legend


def test_scales_are_drawn_from_their_start():
    """The height of a bar is the distance of the weight from 1."""
    weights = {'layer1': ScaleWeights((7, 4, 1), (1.02, 0.5, -0.1)), 'layer2': ScaleWeights((7, 4, 1), (1., 1., 1.))}
    axis, = figures.draw_scales({'model': weights}).axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.02, 0, -0.5, 0, -1.1, 0])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ['7x7', '4x4', '1x1']


def test_scales_of_checkpoints(tmp_path, capsys):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, _ = make('spa_resnet18')
        nn.init.normal_(model.layer1[0].attn.pyramid_weight, generator=torch.Generator().manual_seed(seed))
        files.append(str(tmp_path / f'{seed}.pth'))
        torch.save(model.state_dict(), files[-1])
    options = [word for file in files for word in ('--checkpoint', file)]
    assert explain('scales', '--model', 'spa_resnet18', *options, '--json') == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == files
    expected = torch.load(files[1])['layer1.0.attn.pyramid_weight']
    assert list(printed[files[1]][0].values())[1:] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_results_page_matches_the_csv_file():
    results = Path(__file__).parent.parent / 'train_scripts' / 'results'
    page = (results / 'README.md').read_text()
    with open(results / 'grocery81' / 'ablate.csv', newline='') as f:
        table = list(csv.reader(f))
    for name, _, top1, change in table[1:]:
        assert re.search(rf'\| {re.escape(name)} +\| {top1} +\| {re.escape(change)} *\|', page), name


def test_ablate_by_command(tmp_path, capsys):
    labels = timm.get_pretrained_cfg('spa_tf_efficientnet_lite0.grocery81').label_names
    for i, label in enumerate(('Beef-Tomato', 'Oatly-Oat-Milk')):
        (tmp_path / 'test' / label).mkdir(parents=True)
        source = sample_image(('coffee', 'chelsea')[i])
        (tmp_path / 'test' / label / 'a.png').write_bytes(source.read_bytes())
    assert {'Beef-Tomato', 'Oatly-Oat-Milk'} <= set(labels)
    assert explain('ablate', '--images', tmp_path, '--json', '--out', tmp_path / 'out') == 0
    captured = capsys.readouterr()
    assert captured.err.endswith(f'Wrote {tmp_path / "out"}: ablate.csv.\n'), 'JSON alone is on stdout'
    rows = json.loads(captured.out)
    assert rows[0] == {'gates set to 1/2': 'none', 'right': 1, 'top-1 %': 50., 'against none': None}
    for row in rows[1:]:
        assert row['top-1 %'] == 50 * row['right']
        assert row['against none'] == row['top-1 %'] - 50
    assert rows[-1]['gates set to 1/2'] == 'all'
    assert len(rows) == 18
    lines = (tmp_path / 'out' / 'ablate.csv').read_text().splitlines()
    assert len(lines) == 19
    assert lines[1] == 'none,1,50.00,'
    assert re.fullmatch(r'all,\d,\d+\.\d\d,[+-]\d+\.\d\d', lines[-1])
    assert explain('ablate', '--images', tmp_path / 'none') == 1
    assert 'none cannot be read as an image folder' in capsys.readouterr().err


def test_bad_arguments(capsys):
    assert explain('gates', IMAGE, '--blocks', 'blocks.9') == 1
    assert "'blocks.9' is not a gated block of the model" in capsys.readouterr().err
    assert explain('scales', '--checkpoint', 'x.pth') == 1
    assert 'x.pth does not exist' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='2'):
        explain()


def test_a_single_block_and_invalid_batches():
    model, x = make('spa_resnet18')
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm starts the last one of a block at zero
    assert list(gate_maps(model, x, 'layer1.0')) == ['layer1.0']
    with torch.no_grad():
        with neutral_gates(model, 'layer2.1'):
            one = model(x)
        with neutral_gates(model, ['layer2.1']):
            assert torch.equal(model(x), one)
        assert not torch.equal(model(x), one)
    for images in (x[0], x[:0], [x], None):
        with pytest.raises(ExplainError, match='Expected a batch of at least one image'):
            gate_maps(model, images)
        with pytest.raises(ExplainError, match='Expected a batch of at least one image'):
            ablate(model, [(images, torch.zeros(2))])
    with pytest.raises(ExplainError, match='Expected a class for each of 2 images'):
        ablate(model, [(x, torch.zeros(3))])
    with pytest.raises(ExplainError, match='cannot be measured: `batches` is empty'):
        ablate(model, [])


def write_run(folder, rows=('0,3,4,10',), **args):
    folder.mkdir(parents=True)
    (folder / 'args.yaml').write_text(json.dumps(dict(model='spa_resnet18', **args)))
    if rows is not None:
        (folder / 'summary.csv').write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1', *rows]))
    return folder


def test_failed_runs_are_skipped(tmp_path, capsys):
    """Each skipped run is named, and the exit code is 1."""
    good = write_run(tmp_path / 'good', lr=0.1)
    bad = [
        write_run(tmp_path / 'none', rows=None), write_run(tmp_path / 'empty', rows=()),
        write_run(tmp_path / 'broken', rows=('0,a,b,c',)), tmp_path / 'notes.txt']
    bad[-1].write_text('mine')
    assert explain('curves', *bad[:2], good, *bad[2:], '--json') == 1
    captured = capsys.readouterr()
    assert [row['trained'] for row in json.loads(captured.out)] == ['spa_resnet18']
    lines = captured.err.splitlines()
    assert len(lines) == 4
    for line, run in zip(lines, bad, strict=True):
        assert line.startswith('timm-spa: run skipped: ')
        assert str(run) in line
    assert explain('curves', *bad) == 1
    assert 'none does not contain a training run: summary.csv was not found' in capsys.readouterr().err
    with pytest.raises(RunError, match='empty/summary.csv has no epochs'):
        read_curves([good, bad[1]])
    assert list(read_curves(str(good))) == list(read_curves([good])) == ['spa_resnet18']
    with pytest.raises(RunError, match='No runs were given'):
        read_curves([])


def test_numbers_that_json_does_not_support(tmp_path, capsys):
    assert explain('curves', write_run(tmp_path / 'run', rows=('0,nan,inf,10',)), '--json') == 0

    def refuse(name):
        raise AssertionError(name)

    (row,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert row['train_loss'] is row['eval_loss'] is None
    assert row['eval_top1'] == 10


def test_the_legend_of_the_curves_is_complete_and_covers_nothing():
    """Labels contain every setting that differs, so they may be longer than the width of a panel."""
    run = [dict(epoch=i, train_loss=2 - i, eval_loss=3 - i, eval_top1=10 * i) for i in range(2)]
    labels = [f'spa_resnet50 {" ".join(f"setting_{i}={value}" for i in range(12))}' for value in range(12)]
    figure = figures.draw_curves({'': {label: [run] for label in labels}})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    for axis in figure.axes:
        assert not box.overlaps(axis.get_tightbbox(for_layout_only=True) if axis.get_legend() is None else axis.bbox)
        assert axis.bbox.height > 150, 'the panels keep their height'
    assert box.y1 <= figure.axes[-1].xaxis.get_tightbbox().y0, 'below the label of the axis'
    assert [' '.join(text.get_text().split()) for text in legend.get_texts()] == labels
