"""Settings of a detector's training, with the recipe of the paper as their default."""
import dataclasses
import math
from typing import Any, Optional, Tuple

from .backbone import DetectionError

__all__ = ['BASE_RATES', 'Settings', 'learning_rate']

BASE_RATES = {'retinanet': 0.01, 'cascade_rcnn': 0.02}  # learning rates of the paper, for BASE_BATCH images per step
BASE_BATCH = 16
WARMUP_STEPS = 500
WARMUP_START = 0.001  # fraction of the learning rate


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a training. The defaults are the recipe of the paper's table VI.

    Attributes:
        epochs: Number of epochs.
        batch_size: Images per step and process.
        lr: Learning rate. If None, the paper's, scaled linearly to the images per step of all processes.
        decay_epochs: Epochs after which the learning rate is divided by 10. If None, 18 and 22 of 24 epochs, and in
            proportion for other numbers of epochs.
        warmup_steps: Steps over which the learning rate rises from almost 0. If None, 500, or one epoch if it is
            shorter.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters.
        clip_grad: Maximum norm of the gradient. If None, gradients are not clipped.
        mixed_precision: 'no', 'bf16' or 'fp16'.
        flip: Mirror half of the images.
        seed: Seed for the order of the images, mirroring and the sampling of boxes.
    """
    epochs: int = 24
    batch_size: int = 2
    lr: Optional[float] = None
    decay_epochs: Optional[Tuple[int, ...]] = None
    warmup_steps: Optional[int] = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_grad: Optional[float] = None
    mixed_precision: str = 'no'
    flip: bool = True
    seed: int = 42

    def completed(self, detector: str, images: int, processes: int) -> 'Settings':
        """Returns checked settings without None, except for `clip_grad`.

        Args:
            detector: 'retinanet' or 'cascade_rcnn'.
            images: Number of images in the training set.
            processes: Number of processes that train.

        Raises:
            DetectionError: A setting has another type, or is out of range.
        """
        self._check()
        rate = BASE_RATES[detector] * self.batch_size * processes / BASE_BATCH
        decay = (round(self.epochs * 18 / 24), round(self.epochs * 22 / 24))
        steps = math.ceil(math.ceil(images / processes) / self.batch_size)
        return dataclasses.replace(
            self,
            lr=rate if self.lr is None else self.lr,
            decay_epochs=decay if self.decay_epochs is None else tuple(self.decay_epochs),
            warmup_steps=min(WARMUP_STEPS, steps) if self.warmup_steps is None else self.warmup_steps,
        )

    def _check(self) -> None:
        def expect(valid: bool, name: str, expected: str) -> None:
            if not valid:
                raise DetectionError(f'{name} must be {expected}, got {getattr(self, name)!r}.')

        for name, smallest, largest in (
                ('seed', 0, 2 ** 32 - 1), ('epochs', 1, math.inf), ('batch_size', 1, math.inf),
                ('warmup_steps', 0, math.inf)):
            value = getattr(self, name)
            valid = type(value) is int and smallest <= value <= largest
            limit = f' to {largest}' if largest < math.inf else ''
            expect(valid or (name == 'warmup_steps' and value is None), name, f'a whole number from {smallest}{limit}')
        for name in ('lr', 'clip_grad'):
            value = getattr(self, name)
            expect(value is None or (_is_number(value) and value > 0), name, 'a number above 0')
        expect(_is_number(self.momentum) and 0 <= self.momentum < 1, 'momentum', 'a number from 0 to below 1')
        expect(_is_number(self.weight_decay) and self.weight_decay >= 0, 'weight_decay', 'a number from 0')
        expect(isinstance(self.flip, bool), 'flip', 'True or False')
        epochs = self.decay_epochs
        expect(
            epochs is None or isinstance(epochs, (list, tuple)) and all(type(epoch) is int for epoch in epochs),
            'decay_epochs', 'a sequence of whole numbers')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def learning_rate(settings: Settings, epoch: int, step: int) -> float:
    """Returns the learning rate of a step.

    Args:
        settings: Settings, from `Settings.completed`.
        epoch: Epoch, from 0.
        step: Step since the start of training, from 0.
    """
    assert settings.lr is not None
    assert settings.decay_epochs is not None
    rate = settings.lr * 0.1 ** sum(epoch >= decay for decay in settings.decay_epochs)
    if settings.warmup_steps and step < settings.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / settings.warmup_steps
    return rate
