"""Checks during training that `timm_spa.run train` adds to timm's train.py, which runs unchanged.

timm's script continues when the loss is not finite, and saves such weights. A full disk ends in an error of the file
format. A resumed run writes a second header into its metrics. Class names are not saved. `training_replacements` lists
the functions and classes of timm that are replaced while the script runs.
"""
import logging
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Tuple

import timm.data
from PIL import Image
from timm import utils

from .._errors import TimmSpaError
from ..checkpoints.files import replacing
from ..checkpoints.fit import first_few
from ..checkpoints.run_files import RunError
from .log import CLASSES_FILE, read_classes, read_summary, write_summary

__all__ = ['Replacement', 'TrainingError', 'replaced', 'training_replacements']

MAX_INVALID_LOSSES = 5  # in a row; a loss scaler may skip single steps of float16

Replacement = Tuple[Any, str, Any]  # a module or class, the name of its attribute, and the new value

_logger = logging.getLogger(__name__)
_timm_create_loader = timm.data.create_loader


class TrainingError(TimmSpaError, RuntimeError):
    """A training run, or another of timm's scripts, cannot start or continue."""


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Replaces attributes of modules or classes within the context."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def training_replacements(class_names: Sequence[str] = ()) -> List[Replacement]:
    """Returns the replacements for timm's train.py.

    Args:
        class_names: Classes of the training data, in the order of the model's outputs. The saver reads them when it is
            created, after the script has opened the data.
    """
    return [
        (utils, 'AverageMeter', _AverageMeter),
        (utils, 'CheckpointSaver', type('CheckpointSaver', (_CheckpointSaver,), dict(class_names=class_names))),
        (utils, 'update_summary', _update_summary),
        (timm.data, 'create_loader', _create_loader),
    ]


class _AverageMeter(utils.AverageMeter):
    """timm's average meter, which stops the run after several non-finite losses in a row."""

    invalid_in_a_row = 0

    def update(self, val: float, n: int = 1) -> None:
        self.invalid_in_a_row = 0 if math.isfinite(val) else self.invalid_in_a_row + 1
        if self.invalid_in_a_row == MAX_INVALID_LOSSES:
            raise TrainingError(
                f'The loss was {val} for {MAX_INVALID_LOSSES} steps in a row. Earlier checkpoints are unchanged. '
                'Resume from the last one with a lower --lr, with --clip-grad, or with bfloat16 instead of float16.')
        super().update(val, n)


class _CheckpointSaver(utils.CheckpointSaver):
    """timm's saver, which keeps earlier checkpoints if a new one is invalid or cannot be written."""

    class_names: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.class_names:
            self._write_classes(Path(self.checkpoint_dir) / CLASSES_FILE)
        # timm v1.0.28 forgets the best epoch when it resumes, and would replace model_best by the next epoch
        resume = getattr(self.args, 'resume', None)
        if resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(self.checkpoint_dir):
            self.load_state_dict_from_checkpoint(resume)

    def _write_classes(self, path: Path) -> None:
        if path.exists() and read_classes(path.parent) != [*self.class_names]:
            raise TrainingError(
                f'{path} has other classes, or another order, than the training data '
                f'({first_few([*self.class_names])}). Choose another --experiment, or continue with the same data.')
        with replacing(path) as partial:
            partial.write_text(''.join(f'{name}\n' for name in self.class_names), encoding='utf-8')

    def _save(self, save_path: str, epoch: int, metric: Any = None) -> None:
        invalid = [
            name for name, tensor in utils.get_state_dict(self.model, self.unwrap_fn).items()
            if tensor.is_floating_point() and not tensor.isfinite().all()]
        if invalid:
            raise TrainingError(
                f'Epoch {epoch} was not saved: {len(invalid)} tensors are not finite ({first_few(invalid)}). Earlier '
                f'checkpoints in {self.checkpoint_dir} are unchanged. Resume with a lower --lr or with --clip-grad.')
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as e:
            Path(save_path).unlink(missing_ok=True)
            free = shutil.disk_usage(self.checkpoint_dir).free / 2**20
            raise TrainingError(
                f'The checkpoint of epoch {epoch} could not be written to {self.checkpoint_dir} ({free:.0f} MiB free): '
                f'{e}. Earlier checkpoints are unchanged. Free some space and add --resume '
                f'{os.path.join(self.checkpoint_dir, "last.pth.tar")}') from e


def _update_summary(epoch: int, train_metrics: Any, eval_metrics: Any, filename: str, **kwargs: Any) -> None:
    """Appends timm's row to a file with one header, after removing rows of this epoch and later ones."""
    path = Path(filename)
    rows = []
    try:
        if path.exists():
            rows = [row for row in read_summary(path) if row['epoch'] < epoch]
            if rows:
                write_summary(path, rows)
            else:
                _logger.warning(f'{path} belongs to an earlier training. Renamed to {_set_aside(path, "before")}.')
    except RunError as e:  # truncated or edited
        _logger.warning(f'{e} Renamed to {_set_aside(path, "unreadable")}. {path.name} starts with epoch {epoch}.')
    size = path.stat().st_size if rows else 0
    try:
        utils.summary.update_summary(
            epoch, train_metrics, eval_metrics, filename, **dict(kwargs, write_header=not rows))
    except OSError as e:
        os.truncate(path, size)  # remove the partial row
        raise TrainingError(
            f'{path} could not be written: {e}. Checkpoints are unchanged. Free some space and resume.') from e


def _set_aside(path: Path, suffix: str) -> str:
    """Adds a suffix to the name of a file, numbered if the new name exists, and returns the new name."""
    renamed, number = path.with_name(f'{path.name}.{suffix}'), 1
    while os.path.lexists(renamed):
        renamed, number = path.with_name(f'{path.name}.{suffix}.{number}'), number + 1
    path.rename(renamed)
    return renamed.name


def _create_loader(dataset: Any, input_size: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    """Creates timm's loader; warns if training leaves out many images or crops unpadded ones."""
    if kwargs.get('is_training') and hasattr(dataset, '__len__'):
        steps, remaining = divmod(len(dataset), batch_size)
        if not steps:
            raise TrainingError(
                f'An epoch has no steps: {len(dataset)} training images are fewer than one batch of {batch_size}. Set '
                'a smaller --batch-size.')
        if remaining > len(dataset) / 20:
            _logger.warning(
                f'Each epoch leaves out {remaining} of {len(dataset)} images (batches of {batch_size}). A smaller '
                '--batch-size uses more of them.')
        _check_padding(dataset, input_size, kwargs.get('scale'), kwargs.get('ratio'))
    return _timm_create_loader(dataset, input_size, batch_size, *args, **kwargs)


def _check_padding(dataset: Any, input_size: Any, scale: Any, ratio: Any) -> None:
    """Warns if a recipe crops windows of a fixed size from padded images, and the first image is not padded."""
    if not (scale and ratio and len({*scale}) == len({*ratio}) == 1 and scale[0] < 1):
        return
    expected = round(input_size[-1] / math.sqrt(scale[0]))
    try:
        file, _ = dataset.reader[0]
        with file, Image.open(file) as image:
            size = image.size
    except Exception:  # a broken image, or a dataset without random access: timm reports it
        return
    if size != (expected, expected):
        _logger.warning(
            f'The recipe crops {input_size[-1]}x{input_size[-1]} from images of {expected}x{expected}, but the first '
            f'training image has {size[0]}x{size[1]}: crops will be resized. Pad the images first '
            '(train_scripts/prepare_data.py pad).')
