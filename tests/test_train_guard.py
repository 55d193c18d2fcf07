"""Metrics files and checks during training, without timm's scripts; test_training.py runs them together."""
import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import timm.data
import torch
from PIL import Image
from timm import utils

from timm_spa.checkpoints.run_files import RunError
from timm_spa.training.guard import TrainingError, replaced, training_replacements
from timm_spa.training.log import read_classes, read_summary, write_summary

HEADER = 'epoch,train_loss,eval_top1\n'


def guarded_training(class_names=()):
    return replaced(training_replacements(class_names))


@pytest.fixture
def summary(tmp_path):
    def write(text):
        (tmp_path / 'summary.csv').write_text(text)
        return tmp_path / 'summary.csv'
    return write


@pytest.mark.parametrize(('text', 'epochs', 'losses'), [
    (HEADER + '0,2.5,10\n1,2.0,20\n', [0, 1], [2.5, 2.0]),
    (HEADER + '0,2.5,10\n' + HEADER + '1,2.0,20\n', [0, 1], [2.5, 2.0]),
    (HEADER + '0,2.5,10\n1,9.0,1\n' + HEADER + '1,2.0,20\n2,1.5,30\n', [0, 1, 2], [2.5, 2.0, 1.5]),
    (HEADER + '3,2.5,10\r\n4,nan,20\r\n', [3, 4], [2.5, pytest.approx(float('nan'), nan_ok=True)]),
    ('\ufeff' + HEADER + '0,2.5,10\n\n1,2.0,nan\n\n', [0, 1], [2.5, 2.0]),
    ('epoch,eval_top1,train_loss\n0,10,2.5\n' + HEADER + '1,2.0,20\n', [0, 1], [2.5, 2.0]),
])
def test_one_row_per_epoch(summary, text, epochs, losses):
    rows = read_summary(summary(text))
    assert [row['epoch'] for row in rows] == epochs
    assert [row['train_loss'] for row in rows] == losses


@pytest.mark.parametrize(('text', 'message'), [
    ('', 'has no epochs: expected a header and one row per epoch'),
    (HEADER, 'has no epochs: expected a header and one row per epoch'),
    (HEADER + '0,2.5,10\n2,2.0,20\n', 'epoch 1 is missing'),
    (HEADER + '0,2.5,10\n1,2.0\n', "line 3: expected one number for each of 3 columns, got '1,2.0'"),
    (HEADER + '0,two,10\n', 'line 2: expected one number for each of 3 columns'),
    (HEADER + 'inf,2.5,10\n', 'line 2: expected one number for each of 3 columns'),
    (HEADER + '0,2.5,10\n300000000,2.0,20\n', 'epoch 1 to 299999999 is missing'),
    ('epoch,train_loss\n0,2.5\n', 'column eval_top1 is missing. Columns: epoch, train_loss'),
    ('0,2.5,10\n', 'line 1: expected one number for each of 0 columns'),
])
def test_invalid_metrics_files_are_refused(summary, text, message):
    with pytest.raises(RunError, match=message):
        read_summary(summary(text))


def test_missing_metrics_file(tmp_path):
    with pytest.raises(RunError, match=r'none\.csv cannot be read'):
        read_summary(tmp_path / 'none.csv')


def test_rows_are_written_as_read(summary, tmp_path):
    rows = read_summary(summary(HEADER + '0,2.5,10\n' + HEADER + '1,0.1,20\n'))
    write_summary(tmp_path / 'clean.csv', rows)
    assert (tmp_path / 'clean.csv').read_text().splitlines() == [HEADER.strip(), '0,2.5,10.0', '1,0.1,20.0']
    assert read_summary(tmp_path / 'clean.csv') == rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ['clean.csv', 'summary.csv']


def test_columns_of_the_last_row(tmp_path):
    """A resumed run may have other metrics."""
    rows = [dict(epoch=0., eval_top1=1.), dict(epoch=1., eval_top1=2., lr=0.5)]
    write_summary(tmp_path / 'summary.csv', rows)
    assert (tmp_path / 'summary.csv').read_text() == 'epoch,eval_top1,lr\n0,1.0,\n1,2.0,0.5\n'


def test_class_names_keep_their_spaces(tmp_path):
    assert read_classes(tmp_path) == []
    (tmp_path / 'classes.txt').write_text(' a\nb \n\n')
    assert read_classes(tmp_path) == [' a', 'b ']


def append(path, epoch):
    with guarded_training():
        utils.update_summary(epoch, {'loss': epoch + .5}, {'top1': 10. * epoch}, str(path), write_header=True)


def test_resumed_runs_write_one_row_per_epoch(tmp_path):
    path = tmp_path / 'summary.csv'
    for epoch in (0, 1, 2, 2, 3, 1, 2):
        append(path, epoch)
    assert path.read_text().split() == ['epoch,train_loss,eval_top1', *(f'{e},{e + .5},{10. * e}' for e in range(3))]
    before = path.read_text()
    append(path, 0)
    assert len(read_summary(path)) == 1, 'a new run in the folder of another one'
    assert (tmp_path / 'summary.csv.before').read_text() == before
    append(path, 0)
    assert (tmp_path / 'summary.csv.before').read_text() == before
    assert len(read_summary(tmp_path / 'summary.csv.before.1')) == 1


def test_unreadable_metrics_file_is_renamed(summary):
    path = summary(HEADER + '0,2.5,10\n1,2.')
    append(path, 2)
    assert len(read_summary(path)) == 1
    assert path.with_suffix('.csv.unreadable').read_text().endswith('1,2.')


def test_full_disk_leaves_no_partial_row(tmp_path):
    """A limit on the file size simulates the full disk."""
    path = tmp_path / 'summary.csv'
    append(path, 0)
    before = read_summary(path)
    code = (
        'import resource, sys; sys.path.insert(0, sys.argv[1]); import test_train_guard\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))\n'
        'test_train_guard.append(sys.argv[2], 1)')
    done = subprocess.run(
        [sys.executable, '-c', code, __file__.rpartition('/')[0], str(path), str(path.stat().st_size + 5)],
        capture_output=True, text=True)
    assert 'TrainingError' in done.stderr
    assert 'could not be written' in done.stderr
    assert read_summary(path) == before
    assert path.read_bytes().endswith(b'\n')


def test_non_finite_losses(tmp_path):
    with guarded_training():
        meter = utils.AverageMeter()
        for value in (1., float('nan'), float('inf'), float('nan'), float('nan'), 2., *[float('nan')] * 4):
            meter.update(value)
        with pytest.raises(TrainingError, match='The loss was nan for 5 steps in a row'):
            meter.update(float('nan'))


@pytest.fixture
def images(tmp_path):
    """Creates a dataset of twelve square images of a given size."""
    def make(size):
        for label in 'ab':
            (tmp_path / label).mkdir()
            for i in range(6):
                Image.new('RGB', (size, size)).save(tmp_path / label / f'{i}.png')
        return timm.data.create_dataset('', str(tmp_path))
    return make


def load(dataset, batch_size, **kwargs):
    with guarded_training():
        return timm.data.create_loader(
            dataset, input_size=(3, 32, 32), batch_size=batch_size, use_prefetcher=False, num_workers=0,
            persistent_workers=False, **kwargs)


def test_images_left_out_of_an_epoch(images, caplog):
    dataset = images(40)
    warning = 'Each epoch leaves out 4 of 12 images (batches of 8)'
    for batch_size, expected in ((12, ''), (4, ''), (8, warning)):
        caplog.clear()
        assert len(load(dataset, batch_size, is_training=True)) == 12 // batch_size
        assert expected in caplog.text
        assert bool(expected) == bool(caplog.text)
    with pytest.raises(TrainingError, match='12 training images are fewer than one batch of 13.* smaller --batch-size'):
        load(dataset, 13, is_training=True)
    assert len(load(dataset, 13)) == 1, 'validation reads all images'


@pytest.mark.parametrize(('size', 'scale', 'ratio', 'warns'), [
    (32, [0.64, 0.64], [1., 1.], True), (40, [0.64, 0.64], [1., 1.], False), (32, [0.35, 1.], [0.75, 1.33], False),
    (32, [1., 1.], [1., 1.], False), (32, None, None, False)])
def test_images_that_are_not_padded(images, caplog, size, scale, ratio, warns):
    load(images(size), 4, is_training=True, scale=scale, ratio=ratio)
    message = 'crops 32x32 from images of 40x40, but the first training image has 32x32'
    assert (message in caplog.text) == warns


def test_broken_first_image_is_left_to_timm(images):
    dataset = images(40)
    Path(dataset.reader.filename(0, absolute=True)).write_bytes(b'not an image')
    assert len(load(dataset, 4, is_training=True, scale=[0.64, 0.64], ratio=[1., 1.])) == 3


def saver(folder, model):
    return utils.CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=1), checkpoint_dir=str(folder))


def test_non_finite_weights_are_not_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    with guarded_training():
        ours = saver(tmp_path, model)
        ours.save_checkpoint(0, 1.)
        before = (tmp_path / 'last.pth.tar').read_bytes()
        model.bias.data[0] = float('inf')
        with pytest.raises(TrainingError, match=r'Epoch 1 was not saved: 1 tensors are not finite \(bias\)'):
            ours.save_checkpoint(1, 2.)
    assert (tmp_path / 'last.pth.tar').read_bytes() == before
    assert not (tmp_path / 'tmp.pth.tar').exists()


@pytest.mark.parametrize(('folder', 'best'), [('run', 5.), ('other', None)])
def test_best_epoch_of_a_resumed_run(tmp_path, folder, best):
    """Restored if the run resumes in its own folder, and not from another run."""
    model = torch.nn.Linear(2, 2)
    for name in ('run', 'other'):
        (tmp_path / name).mkdir()
    args = argparse.Namespace(model='x', resume=str(tmp_path / 'run' / 'last.pth.tar'))
    with guarded_training():
        first = saver(tmp_path / 'run', model)
        for epoch, metric in enumerate((5., 4.)):
            first.save_checkpoint(epoch, metric)
        resumed = utils.CheckpointSaver(
            model, torch.optim.SGD(model.parameters(), lr=1), args=args, checkpoint_dir=str(tmp_path / folder))
    assert resumed.best_metric == best


def test_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    """On a full disk, torch raises an error of its file writer."""
    model = torch.nn.Linear(2, 2)
    with guarded_training():
        ours = saver(tmp_path, model)
        ours.save_checkpoint(0, 1.)

        def fail(state, path):
            with open(path, 'wb') as f:
                f.write(b'partial')
            raise RuntimeError('PytorchStreamWriter failed')

        monkeypatch.setattr(torch, 'save', fail)
        with pytest.raises(TrainingError, match=r'epoch 1 could not be written .* MiB free\): PytorchStreamWriter'):
            ours.save_checkpoint(1, 2.)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint-0.pth.tar', 'last.pth.tar', 'model_best.pth.tar']


def test_classes_file_of_another_training_is_not_replaced(tmp_path):
    model = torch.nn.Linear(2, 2)
    names = []
    with guarded_training(names):
        names += ['a', 'b']  # known after the data is read
        saver(tmp_path, model)
        assert (tmp_path / 'classes.txt').read_text() == 'a\nb\n'
        saver(tmp_path, model)
        names.reverse()
        with pytest.raises(TrainingError, match=(
                r'classes\.txt has other classes, or another order, than the training data \(b, a\)')):
            saver(tmp_path, model)
        assert (tmp_path / 'classes.txt').read_text() == 'a\nb\n'
        names.clear()
        saver(tmp_path / '..', model)
    assert not (tmp_path.parent / 'classes.txt').exists()


def test_timm_is_unchanged_afterwards():
    before = utils.AverageMeter, utils.CheckpointSaver, utils.update_summary, timm.data.create_loader
    with guarded_training():
        assert utils.AverageMeter is not before[0]
    with pytest.raises(KeyError), guarded_training():
        raise KeyError
    assert before == (utils.AverageMeter, utils.CheckpointSaver, utils.update_summary, timm.data.create_loader)
