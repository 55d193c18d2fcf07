"""Checks of what a detector learns from. torchvision would take a wrong label for another class or the background."""
from typing import Any, Mapping, Optional, Sequence

import torch

from .backbone import DetectionError

__all__ = ['check_targets']


def check_targets(images: Sequence[Any], targets: Optional[Sequence[Mapping[str, Any]]], num_classes: int) -> None:
    """Checks boxes and labels of a batch.

    Args:
        images: Images of the batch.
        targets: 'boxes' (T, 4) in pixels and 'labels' (T,) of each image, or None.
        num_classes: Number of classes. Labels are 0 .. num_classes - 1; no label stands for the background.

    Raises:
        DetectionError: Targets are missing, or one of them has another shape, type or value.
    """
    if targets is None or len(targets) != len(images):
        given = 'no' if targets is None else str(len(targets))
        raise DetectionError(
            f'Training needs one target for each image, and there are {len(images)} images and {given} targets. Give a '
            'dictionary with boxes and labels for each image, also for an image without a box.')
    for place, target in enumerate(targets):
        named = f'Target {place} of the batch'
        missing = [key for key in ('boxes', 'labels') if not isinstance(target.get(key), torch.Tensor)]
        if missing:
            raise DetectionError(f'{named}: {missing[0]} is not a tensor. Give boxes (T, 4) and labels (T,).')
        boxes, labels = target['boxes'], target['labels']
        if boxes.shape != (len(labels), 4) or labels.dim() != 1:
            raise DetectionError(
                f'{named}: boxes have the shape {list(boxes.shape)} and labels {list(labels.shape)}. Expected (T, 4) '
                'and (T,), (0, 4) and (0,) for an image without a box.')
        if labels.dtype != torch.long:
            raise DetectionError(
                f'{named}: labels are {labels.dtype}. Give the numbers 0 to {num_classes - 1} as torch.int64.')
        wrong_label = (labels < 0) | (labels >= num_classes)
        wrong_box = ~(boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
        if (wrong_label | wrong_box).any():  # once for both: each look at a value waits for the GPU
            if wrong_label.any():
                raise DetectionError(
                    f'{named}: the label {labels[wrong_label][0].item()} is not one of 0 to {num_classes - 1}, the '
                    f'labels of a detector with num_classes={num_classes}. No label stands for the background: leave '
                    'out boxes without an object.')
            raise DetectionError(
                f'{named}: the box {boxes[wrong_box][0].tolist()} has no area. Boxes are left, top, right and bottom '
                'in pixels, with left < right and top < bottom.')
