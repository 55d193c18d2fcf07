"""Checks during training that `timm_spa.run train` adds to timm's train.py, which runs unchanged.

timm's script continues when the loss is not finite, and saves such weights. A full disk ends in an error of the file
format. A resumed run writes a second header into its metrics. The names of the classes are lost. Everything here
replaces functions of the timm package that the script calls, while it runs.
"""
import logging
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence, Tuple

import timm.data
from PIL import Image
from timm import utils

from .._errors import TimmSpaError
from ..checkpoints.files import replacing
from ..checkpoints.fit import first_few
from .log import CLASSES_FILE, SummaryError, read_classes, read_summary, write_summary

__all__ = ['TrainingError', 'guarded_training', 'replaced']

MAX_BAD_LOSSES = 5  # in a row; a loss scaler may skip single steps of float16

_logger = logging.getLogger(__name__)


class TrainingError(TimmSpaError, RuntimeError):
    """Training cannot go on; the message says why, and what was saved."""


class _AverageMeter(utils.AverageMeter):
    """timm's average meter, which stops the run after several non-finite losses in a row."""

    bad_in_a_row = 0

    def update(self, val: float, n: int = 1) -> None:
        self.bad_in_a_row = 0 if math.isfinite(val) else self.bad_in_a_row + 1
        if self.bad_in_a_row == MAX_BAD_LOSSES:
            raise TrainingError(
                f'The loss was {val} for {MAX_BAD_LOSSES} steps in a row. Earlier checkpoints are as they were. Resume '
                'from the last one with a lower --lr, with --clip-grad, or with bfloat16 in place of float16.')
        super().update(val, n)


class _CheckpointSaver(utils.CheckpointSaver):
    """timm's saver, which never replaces a good checkpoint with a bad one."""

    class_names: Sequence[str] = ()  # of the training data, in the order of the model's outputs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.class_names:
            self._write_classes(Path(self.checkpoint_dir) / CLASSES_FILE)
        # timm's script forgets the best epoch when it resumes, and would call the next one the best
        resume = getattr(self.args, 'resume', None)
        in_place = resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(self.checkpoint_dir)
        if in_place:
            self.load_state_dict_from_checkpoint(resume)

    def _write_classes(self, path: Path) -> None:
        if path.exists() and read_classes(path.parent) != [*self.class_names]:
            raise TrainingError(
                f'{path} names other classes than the training data ({first_few([*self.class_names])}), or in another '
                'order. Train into another folder, or continue with the data that the file is of.')
        with replacing(path) as partial:
            partial.write_text(''.join(f'{name}\n' for name in self.class_names), encoding='utf-8')

    def _save(self, save_path: str, epoch: int, metric: Any = None) -> None:
        bad = [
            name for name, tensor in utils.get_state_dict(self.model, self.unwrap_fn).items()
            if tensor.is_floating_point() and not tensor.isfinite().all()]
        if bad:
            raise TrainingError(
                f'Epoch {epoch} is not saved: {len(bad)} tensors of the model are not finite any more, {bad[0]} first. '
                f'The checkpoints in {self.checkpoint_dir} are those of earlier epochs.')
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as e:
            Path(save_path).unlink(missing_ok=True)
            free = shutil.disk_usage(self.checkpoint_dir).free / 2**20
            raise TrainingError(
                f'The checkpoint of epoch {epoch} could not be written to {self.checkpoint_dir}, where {free:.0f} MiB '
                f'are free: {e}. Earlier checkpoints are as they were; make room and add --resume '
                f'{os.path.join(self.checkpoint_dir, "last.pth.tar")}') from e


def _update_summary(epoch: int, train_metrics: Any, eval_metrics: Any, filename: str, **kwargs: Any) -> None:
    """Appends timm's row to a file that has one header and no row of this epoch or a later one."""
    path = Path(filename)
    try:
        rows = [row for row in read_summary(path) if row['epoch'] < epoch] if path.exists() else []
        if rows:
            write_summary(path, rows)
        elif path.exists():
            kept = _set_aside(path, 'before')
            _logger.warning(f'{path} is of an earlier training. It is kept as {kept.name}.')
    except SummaryError as e:
        # the file was cut off or edited: keep it, and begin a new one for the rows from here on
        kept = _set_aside(path, 'unreadable')
        rows = []
        _logger.warning(f'{e} It is kept as {kept.name}, and {path.name} starts anew.')
    size = path.stat().st_size if rows else 0
    try:
        utils.summary.update_summary(
            epoch, train_metrics, eval_metrics, filename, **dict(kwargs, write_header=not rows))
    except OSError as e:
        os.truncate(path, size)  # leave no partial row
        raise TrainingError(f'{path} could not be written: {e}. The checkpoints are as they were.') from e


def _set_aside(path: Path, why: str) -> Path:
    """Renames a file to a name that no file has."""
    kept, number = path.with_name(f'{path.name}.{why}'), 1
    while os.path.lexists(kept):
        kept, number = path.with_name(f'{path.name}.{why}.{number}'), number + 1
    path.rename(kept)
    return kept


def _create_loader(dataset: Any, input_size: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get('is_training') and hasattr(dataset, '__len__'):
        steps, left = divmod(len(dataset), batch_size)
        if not steps:
            raise TrainingError(
                f'{len(dataset)} pictures are less than one batch of {batch_size}: there would be no step. Set a '
                'smaller --batch-size.')
        if left > len(dataset) / 20:
            _logger.warning(
                f'{len(dataset)} pictures make {steps} steps of {batch_size} an epoch, and {left} pictures are left '
                'out of each epoch. A smaller --batch-size uses more of them.')
        _check_padding(dataset, input_size, kwargs.get('scale'), kwargs.get('ratio'))
    return _timm_create_loader(dataset, input_size, batch_size, *args, **kwargs)


def _check_padding(dataset: Any, input_size: Any, scale: Any, ratio: Any) -> None:
    """Warns if the recipe's fixed-size crops, meant for padded pictures, would crop pictures that are not padded."""
    if not (scale and ratio and len({*scale}) == len({*ratio}) == 1 and scale[0] < 1):
        return
    wanted = round(input_size[-1] / math.sqrt(scale[0]))
    try:
        file, _ = dataset.reader[0]
        with file, Image.open(file) as image:
            size = image.size
    except Exception:  # a broken picture, or a data set that cannot be asked for its first one
        return
    if size != (wanted, wanted):
        _logger.warning(
            f'The recipe takes windows of {input_size[-1]}x{input_size[-1]} out of pictures of {wanted}x{wanted}, and '
            f'the first picture to train on has {size[0]}x{size[1]}: what is cut out will be resized. Pad the pictures '
            'first (train_scripts/prepare_data.py pad).')


_timm_create_loader = timm.data.create_loader


@contextmanager
def replaced(*replacements: Tuple[Any, str, Any]) -> Iterator[None]:
    """Replaces attributes of modules or classes within the context: each is an owner, a name and the new value."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, ours in replacements:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextmanager
def guarded_training(class_names: Sequence[str] = ()) -> Iterator[None]:
    """Installs the checks of this module in timm's train.py within the context.

    Args:
        class_names: Classes of the training data, in the order of the model's outputs. They are read when the first
            checkpoint is prepared.
    """
    saver = type('CheckpointSaver', (_CheckpointSaver,), dict(class_names=class_names))
    with replaced(
            (utils, 'AverageMeter', _AverageMeter), (utils, 'CheckpointSaver', saver),
            (utils, 'update_summary', _update_summary), (timm.data, 'create_loader', _create_loader)):
        yield
