"""`timm-spa detect` as a user runs it: training, resuming after a kill, evaluation and drawing."""
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import timm
import torch
import yaml
from coco_files import NAMES, write_coco, write_rectangles
from PIL import Image

import timm_spa_cli
from timm_spa.detection import DetectionError, load_detector, retinanet, save_detector
from timm_spa.detection import train as training
from timm_spa.detection.data import CocoDataset, find_dataset
from timm_spa.detection.evaluate import coco_figures
from timm_spa.detection.evaluate import detect as run_detector
from timm_spa.detection.train import Settings, learning_rate, train
from timm_spa.training.guard import TrainingError

MODEL = 'spa_mobilenetv2_050'
SMALL = ('--model', MODEL, '--min-size', 64, '--max-size', 64, '--batch-size', 4, '--device', 'cpu', '--workers', 0)


def detect(*arguments):
    return timm_spa_cli.main(['detect', *map(str, arguments)])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_rectangles(tmp_path_factory.mktemp('data'), count=8, size=64)


def evaluate_alone(checkpoint, data):
    """Returns COCO's AP in percent, computed by one process."""
    model = load_detector(checkpoint)
    dataset = CocoDataset(data / 'val', data / 'val.json', categories=model.categories)
    return coco_figures(dataset, run_detector(model, dataset, 4, 0))['AP']


def content(run):
    """Returns the files that must not depend on how often a run was killed."""
    names = (
        'summary.csv', 'args.yaml', 'training_state.safetensors', 'last/model.safetensors', 'best/model.safetensors')
    return {name: (run / name).read_bytes() for name in names}


def test_train_evaluate_predict(tmp_path, data, capsys):
    plain = timm.create_model('mobilenetv2_050')
    safetensors.torch.save_file(plain.state_dict(), tmp_path / 'plain.safetensors')
    run = tmp_path / 'run'
    assert detect(
        'train', '--data', data, *SMALL, '--epochs', 2, '--output', run, '--lr', 0.005, '--pretrained-path',
        tmp_path / 'plain.safetensors', '--clip-grad', 10) == 0
    log = capsys.readouterr().err
    assert 'train.json: 8 images, 0 without boxes; 24 boxes of 3 categories' in log
    assert log.count('epoch 1: loss') == 1
    assert sorted(p.name for p in run.iterdir()) == [
        'args.yaml', 'best', 'last', 'summary.csv', 'training_state.safetensors']
    with open(run / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['epoch', 'train_loss', 'eval_map', 'eval_ap50', 'eval_ap75', 'lr']
    assert [row['epoch'] for row in rows] == ['0', '1']
    args = yaml.safe_load((run / 'args.yaml').read_text())
    assert args['model'] == MODEL
    assert args['settings']['batch_size'] == 4
    model = load_detector(run / 'best')
    assert [c['name'] for c in model.categories] == list(NAMES)
    stem = model.state_dict()['backbone.body.conv_stem.weight']
    assert torch.equal(stem, plain.conv_stem.weight), 'the frozen stem has the weights of the file'

    assert timm_spa_cli.main(['explain', 'curves', str(run), '--out', str(tmp_path / 'curves')]) == 0
    drawn = capsys.readouterr().out
    assert 'validation AP50 (%)' in drawn
    assert f'retinanet {MODEL}' in drawn
    assert (tmp_path / 'curves' / 'curves.png').exists()

    results = tmp_path / 'results.json'
    source = ('--images', data / 'val', '--annotations', data / 'val.json', '--device', 'cpu', '--workers', 0)
    assert detect('eval', run / 'best', *source, '--out', results) == 0
    *lines, _, written = capsys.readouterr().out.splitlines()
    assert written == f'Wrote {results}.'
    figures = dict(line.split() for line in lines)
    best = max(rows, key=lambda row: float(row['eval_map']))
    assert float(figures['AP']) == pytest.approx(float(best['eval_map']), abs=0.051)
    assert len(figures) == 13
    assert figures['AP_L'] == '-'
    assert all(result['category_id'] in (1, 2, 3) for result in json.loads(results.read_text()))

    out = tmp_path / 'out'
    images = [data / 'val' / '0.png', data / 'val' / '1.png']
    assert detect(
        'predict', *images, tmp_path / 'none.png', '--checkpoint', run / 'best', run / 'last', '--out', out,
        '--score', 0.01, '--device', 'cpu') == 1
    captured = capsys.readouterr()
    assert 'none.png cannot be read as an image: No such file' in captured.err
    assert captured.out.count('objects by run-') == 4
    assert sorted(p.name for p in out.iterdir()) == ['0-boxes.png', '1-boxes.png', 'run-best.json', 'run-last.json']
    with Image.open(out / '0-boxes.png') as image:
        assert image.width == 2 * 512 + 4
    assert {r['image_id'] for r in json.loads((out / 'run-last.json').read_text())} <= {'0.png', '1.png'}


@pytest.mark.slow
def test_a_killed_run_resumes_with_identical_results(tmp_path, data, monkeypatch):
    """Killed by SIGKILL in the second epoch, then stopped between writing a checkpoint and the state, then resumed."""
    command = ['train', '--data', data, *SMALL, '--epochs', 3, '--lr', 0.002]
    assert detect(*command, '--output', tmp_path / 'whole') == 0
    run = tmp_path / 'killed'
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_spa', 'detect', *map(str, command), '--output', str(run)],
        stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (run / 'summary.csv').exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    written = training.write_state

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, 'write_state', stopped)
    assert detect(*command, '--output', run, '--resume') == 130
    monkeypatch.setattr(training, 'write_state', written)
    assert detect(*command, '--output', run, '--resume') == 0
    whole, again = content(tmp_path / 'whole'), content(run)
    assert [name for name in whole if whole[name] != again[name]] == []
    before = os.stat(run / 'training_state.safetensors').st_mtime_ns
    assert detect(*command, '--output', run, '--resume') == 0
    assert os.stat(run / 'training_state.safetensors').st_mtime_ns == before, 'the run was complete'


def test_runs_that_cannot_resume(tmp_path, data, capsys):
    command = ['train', '--data', data, *SMALL, '--output', tmp_path, '--epochs', 1]
    assert detect(*command) == 0
    capsys.readouterr()
    assert detect(*command) == 1
    assert 'contains a training run. Resume it with --resume, or name another folder.' in capsys.readouterr().err
    assert detect(*command, '--resume', '--seed', 43, '--lr', 1) == 1
    assert 'cannot resume with another settings: lr was 0.0025 and is 1.0; seed was 42 and is 43' in (
        capsys.readouterr().err)
    (tmp_path / 'training_state.safetensors').write_bytes(b'x' * 100)
    assert detect(*command, '--resume') == 1
    assert 'cannot be read as the state of a training run' in capsys.readouterr().err


def open_sets(data):
    train_set = CocoDataset(*find_dataset(data, 'train'))
    return train_set, CocoDataset(*find_dataset(data, 'val'), categories=train_set.categories)


def small(num_classes=3, size=64):
    torch.manual_seed(0)
    return retinanet(MODEL, num_classes, False, min_size=size, max_size=size)


def test_one_dataset_for_training_and_validation(tmp_path, data, monkeypatch):
    """Validation reads unchanged images and boxes, and the caller's dataset is not changed."""
    dataset = open_sets(data)[0]
    before = dict(vars(dataset))
    trained_boxes = []

    def detect_perfectly(model, dataset, batch_size, workers, indices):
        targets = [dataset[index][1] for index in indices]
        return {
            index: dict(target, scores=torch.ones(len(target['boxes'])))
            for index, target in zip(indices, targets, strict=True)}

    def read_batches(loader, original=training.read_batches):
        for images, targets in original(loader):
            trained_boxes.extend(target['boxes'].flatten().tolist() for target in targets)
            yield images, targets

    monkeypatch.setattr(training, 'detect', detect_perfectly)
    monkeypatch.setattr(training, 'read_batches', read_batches)
    rows = train(small(), dataset, dataset, tmp_path, Settings(epochs=1, batch_size=8, seed=1), cpu=True)
    assert rows[0]['eval_map'] == 100
    assert vars(dataset) == before
    original = [dataset[index][1]['boxes'].flatten().tolist() for index in range(len(dataset))]
    assert 0 < sum(boxes in original for boxes in trained_boxes) < len(dataset), 'images are mirrored in training'


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    model = small()
    with torch.no_grad():
        model.head.regression_head.bbox_reg.bias[0] = float('nan')
    with pytest.raises(TrainingError, match=r'The loss is nan at step 0 of epoch 0 \(classification [\d.]+, bbox_reg'):
        train(model, *open_sets(data), tmp_path, Settings(epochs=1), cpu=True)
    assert not (tmp_path / 'last').exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data, monkeypatch):
    """The checkpoint of the previous epoch is kept."""
    train(small(), *open_sets(data), tmp_path, Settings(epochs=1), cpu=True)
    files = ('best/model.safetensors', 'last/model.safetensors', 'training_state.safetensors')
    before = {name: (tmp_path / name).read_bytes() for name in files}
    step = torch.optim.SGD.step

    def diverge(self, *args, **kwargs):
        step(self, *args, **kwargs)
        with torch.no_grad():
            if self.param_groups[0]['params'][-1].isfinite().all() and self.steps_left == 1:
                self.param_groups[0]['params'][-1].fill_(math.inf)
        self.steps_left -= 1

    monkeypatch.setattr(torch.optim.SGD, 'steps_left', 4, raising=False)  # the last step, whose loss is finite
    monkeypatch.setattr(torch.optim.SGD, 'step', diverge)
    monkeypatch.setattr(training, 'read_state', lambda path, model, arguments, resume: ([dict(
        epoch=0, train_loss=1, eval_map=0, eval_ap50=0, eval_ap75=0, lr=1)], {}, {}))
    with pytest.raises(TrainingError, match='Epoch 1 is not saved: 1 tensors of the detector are not finite'):
        train(small(), *open_sets(data), tmp_path, Settings(epochs=2), cpu=True)
    assert {name: (tmp_path / name).read_bytes() for name in files} == before


@pytest.mark.parametrize(('content', 'message'), [
    (b'not an image', 'val/3.png cannot be read as an image'),
    ((65, 64), 'val/3.png has 65 x 64 pixels, but the annotations give 64 x 64')])
def test_images_are_checked_before_the_first_epoch(content, message, tmp_path, monkeypatch):
    data = write_rectangles(tmp_path / 'data', count=4, size=64)
    if isinstance(content, bytes):
        (data / 'val' / '3.png').write_bytes(content)
    else:
        Image.new('RGB', content).save(data / 'val' / '3.png')
    monkeypatch.setattr(training, '_order', lambda *args: pytest.fail('an epoch has started'))
    with pytest.raises(DetectionError, match=message):
        train(small(), *open_sets(data), tmp_path / 'run', cpu=True)
    assert not (tmp_path / 'run').exists()


def test_the_error_of_a_damaged_image_is_one_line(tmp_path):
    """Truncated after its valid header, and read by the training process or by a worker."""
    data = write_rectangles(tmp_path / 'data', count=4, size=64)
    whole = (data / 'val' / '2.png').read_bytes()
    (data / 'val' / '2.png').write_bytes(whole[:len(whole) // 2])
    for workers in (0, 1):
        with pytest.raises(DetectionError) as e:
            run_detector(small(), open_sets(data)[1], 2, workers)
        assert str(e.value).startswith(f'{data}/val/2.png cannot be read as an image: ')
        assert '\n' not in str(e.value)


@pytest.mark.slow
def test_a_seed_of_any_size(tmp_path, data):
    settings = Settings(epochs=1, batch_size=8, seed=2 ** 32 - 1)
    assert len(train(small(), *open_sets(data), tmp_path, settings, cpu=True)) == 1


@pytest.mark.parametrize('seed', [-1, 2 ** 32])
def test_invalid_seeds(seed):
    with pytest.raises(DetectionError, match=f'seed must be a whole number from 0 to 4294967295, got {seed}'):
        Settings(seed=seed).completed('retinanet', 8, 1)


@pytest.mark.parametrize('changes', [
    dict(seed=1.5), dict(epochs='3'), dict(epochs=True), dict(batch_size=2.5), dict(batch_size=0),
    dict(warmup_steps=-3),
    dict(lr=0), dict(lr=-1.), dict(lr='0.1'), dict(lr=math.nan), dict(clip_grad=-1.), dict(momentum=1.),
    dict(momentum=None), dict(weight_decay=-1e-4), dict(weight_decay='a'), dict(flip='no'), dict(decay_epochs=3),
    dict(decay_epochs=(1.5,))])
def test_invalid_settings(changes):
    ((name, value),) = changes.items()
    with pytest.raises(DetectionError, match=f'^{name} must be .*, got {re.escape(repr(value))}.$'):
        Settings(**changes).completed('retinanet', 8, 1)


@pytest.mark.slow
def test_another_precision_in_the_same_process(tmp_path, data):
    # At 64 pixels, a convolution of stride 2 gets a feature map of one pixel. In bfloat16 on CPUs, torch 2.14.1 then
    # returns uninitialized memory as the gradient of its weights.
    for precision in ('no', 'bf16'):
        settings = Settings(epochs=1, batch_size=8, mixed_precision=precision)
        train(small(size=128), *open_sets(data), tmp_path / precision, settings, cpu=True)
        assert load_detector(tmp_path / precision / 'last')


@pytest.fixture
def accelerate_state():
    """accelerate's state as in a new process."""
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    yield AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_accelerator_of_the_program_is_kept(accelerate_state, tmp_path, data):
    from accelerate import Accelerator
    program = Accelerator(cpu=True, mixed_precision='bf16')
    before = dict(accelerate_state._shared_state)
    with pytest.raises(DetectionError, match=r"precision='no' and cpu=True cannot start: .*uses accelerate itself"):
        train(small(), *open_sets(data), tmp_path, Settings(epochs=1), cpu=True)
    assert accelerate_state._shared_state == before
    assert program.mixed_precision == 'bf16'
    assert training._create_accelerator('bf16', True).state.__dict__ is program.state.__dict__
    assert accelerate_state._shared_state == before


def test_a_second_training_with_other_settings(accelerate_state):
    from accelerate.state import PartialState
    for precision in ('no', 'bf16', 'bf16', 'no'):
        assert training._create_accelerator(precision, True).mixed_precision == precision
    with pytest.raises(DetectionError, match="precision='fp9' and cpu=True cannot start: .* Choose another mixed_prec"):
        training._create_accelerator('fp9', True)
    assert not accelerate_state._shared_state
    with pytest.raises(DetectionError, match="'fp16' needs a GPU"):
        training._create_accelerator('fp16', True)
    assert training._create_accelerator('no', True).mixed_precision == 'no'
    accelerate_state._reset_state(reset_partial_state=True)
    program = PartialState(cpu=True)  # a program that uses only this part of accelerate
    for precision in ('no', 'bf16'):
        training._create_accelerator(precision, True)
    assert PartialState._shared_state is program.__dict__
    assert program.num_processes == 1


def test_datasets_that_do_not_match(tmp_path, data):
    train_set, val_set = open_sets(data)
    with pytest.raises(DetectionError, match='train.json has 3 categories, but the detector has 2 classes'):
        train(small(2), train_set, val_set, tmp_path, cpu=True)
    other = CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=[0, 0, 9, 9])]))
    with pytest.raises(DetectionError, match='x.json has other categories than .*train.json'):
        train(small(), train_set, other, tmp_path, cpu=True)
    with pytest.raises(DetectionError, match='epochs must be a whole number from 1, got 0'):
        train(small(), train_set, val_set, tmp_path, Settings(epochs=0), cpu=True)


def test_default_settings_are_the_papers():
    """Two images on each of eight GPUs, 24 epochs, the learning rate divided by 10 after 18 and 22."""
    for detector, rate in (('retinanet', 0.01), ('cascade_rcnn', 0.02)):
        settings = Settings().completed(detector, 117266, 8)
        assert settings.warmup_steps == 500
        assert learning_rate(settings, 0, 0) == pytest.approx(rate / 1000)
        assert learning_rate(settings, 0, 250) == pytest.approx(rate * (0.5 + 0.0005))
        assert [learning_rate(settings, epoch, 10 ** 6) for epoch in (0, 17, 18, 21, 22, 23)] == pytest.approx(
            [rate, rate, rate / 10, rate / 10, rate / 100, rate / 100])
    assert Settings(batch_size=8).completed('retinanet', 480, 1).lr == pytest.approx(0.005)
    assert Settings(batch_size=8).completed('retinanet', 480, 1).warmup_steps == 60
    assert Settings(epochs=12).completed('retinanet', 480, 1).decay_epochs == (9, 11)


def test_all_processes_get_the_same_number_of_images():
    orders = [training._order(7, 0, epoch, 2) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    for order in orders:
        assert len(order) == 8
        assert set(order) == set(range(7))


def test_categories_that_are_unknown_to_the_checkpoint(tmp_path, data, capsys):
    save_detector(small(), tmp_path / 'a', [dict(id=i, name=name) for i, name in enumerate('xyz')])
    assert detect('eval', tmp_path / 'a', '--images', data / 'val', '--annotations', data / 'val.json') == 1
    assert 'the detector was not trained on: blue, green, red. The detector knows x, y, z' in capsys.readouterr().err


def test_invalid_arguments(tmp_path, data, capsys):
    for arguments, message in (
            (['train', '--output', tmp_path], 'name a dataset by --data, or all of --train-images'),
            (['train', '--data', data, '--train-annotations', 'x', '--output', tmp_path], 'name a dataset by --data'),
            (['train', '--data', data, '--output', tmp_path, '--model-kwargs', '{'],
             '--model-kwargs: must be a JSON object'),
            (['train', '--data', data, '--output', tmp_path, '--detector-kwargs', '[1]'],
             '--detector-kwargs: must be a JSON object'),
            (['train', '--data', data, '--output', tmp_path, '--detector-kwargs', '{"min_size": 64}'],
             'argument --detector-kwargs: min_size: set by another option, or by the dataset'),
            (['train', '--data', data, '--output', tmp_path, '--epochs', 0], 'must be at least 1'),
            *((['train', '--data', data, '--output', tmp_path, option, value], f'argument {option}: must be')
              for option, value in (('--workers', -1), ('--lr', -1), ('--lr', 'nan'), ('--clip-grad', 0),
                                    ('--seed', -1), ('--warmup-steps', -1))),
            *([] if torch.cuda.is_available() else [
                (['train', '--data', data, '--output', tmp_path, '--device', 'cuda'], 'torch does not find a GPU')])):
        with pytest.raises(SystemExit, match='2'):
            detect(*arguments)
        assert message in capsys.readouterr().err
    assert detect('train', '--data', tmp_path / 'none', '--output', tmp_path) == 1
    assert "one JSON file for the split 'train'" in capsys.readouterr().err
    assert detect('train', '--data', data, '--output', tmp_path, '--model', 'spa_resnet51') == 1
    assert "Unknown model 'spa_resnet51'" in capsys.readouterr().err
    unknown = ('train', '--data', data, '--output', tmp_path, *SMALL, '--detector-kwargs', '{"no_such": 1}')
    assert detect(*unknown) == 1
    assert 'retinanet: unknown argument no_such.' in capsys.readouterr().err
    assert detect(*unknown, '--detector', 'cascade_rcnn') == 1
    assert 'cascade_rcnn: unknown argument no_such. Further arguments are batch_size_per_image, detections_' in (
        capsys.readouterr().err)
    assert detect('train', '--data', data, '--output', tmp_path, *SMALL, '--model-kwargs', '{"in_chans": 1}') == 1
    assert 'Detectors need in_chans=3, got 1.' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_lazy_imports():
    code = (
        'import sys, timm_spa; print([n for n in sys.modules if n.startswith("timm_spa.detection") or n in '
        '("accelerate", "pycocotools")])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'
    code = 'import sys, timm_spa_cli.detect; print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'False\n'
    code = (
        'import sys, timm_spa.detection.draw; print([n for n in sys.modules if n.startswith(("timm_spa.explain", '
        '"matplotlib"))])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'


@pytest.mark.slow
def test_two_processes(tmp_path, data):
    """Each process takes half of the images, both evaluate, and one writes. Their models stay equal."""
    run, script = tmp_path / 'run', tmp_path / 'main.py'
    script.write_text(
        'import os, sys\n'
        'import torch\n'
        'import timm_spa_cli\n'
        'from timm_spa.detection import train\n'
        'def detect(model, *args, original=train.detect):\n'
        f'    torch.save(model.state_dict(), "{tmp_path}/" + os.environ["RANK"])\n'
        '    return original(model, *args)\n'
        'train.detect = detect\n'
        'sys.exit(timm_spa_cli.main(sys.argv[1:]))\n')
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', 2, script, 'detect', 'train',
        '--data', data, *SMALL, '--epochs', 6, '--output', run, '--lr', 0.005, '--warmup-steps', 0, '--clip-grad', 10]
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count('epoch 5: loss') == 1
    assert yaml.safe_load((run / 'args.yaml').read_text())['processes'] == 2
    with open(run / 'summary.csv', newline='') as f:
        first, *_, last = csv.DictReader(f)
    assert float(last['train_loss']) < float(first['train_loss'])
    assert evaluate_alone(run / 'last', data) == pytest.approx(float(last['eval_map']), abs=0.051)
    evaluated, written = [torch.load(tmp_path / rank) for rank in '01'], load_detector(run / 'last').state_dict()
    for state in evaluated:
        torch.testing.assert_close(state, written, rtol=0, atol=0)
