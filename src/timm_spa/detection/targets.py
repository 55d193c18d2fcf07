"""Checks of the boxes and labels that a detector is trained with."""
from typing import Any, Mapping, Optional, Sequence

import torch

from .backbone import DetectionError

__all__ = ['check_targets']


def check_targets(images: Sequence[Any], targets: Optional[Sequence[Mapping[str, Any]]], num_classes: int) -> None:
    """Checks the boxes and labels of a batch. torchvision would train another class or the background instead.

    Args:
        images: Images of the batch.
        targets: 'boxes' (T, 4) in pixels and 'labels' (T,) of each image, or None.
        num_classes: Number of classes. Labels are 0 .. num_classes - 1. The background has no label.

    Raises:
        DetectionError: Targets are missing, or a target has another shape, type or value.
    """
    if targets is None or len(targets) != len(images):
        count = 'no' if targets is None else str(len(targets))
        raise DetectionError(
            f'Training needs one target per image, got {len(images)} images and {count} targets. Give a dictionary '
            'with boxes and labels for each image, also for an image without boxes.')
    for index, target in enumerate(targets):
        name = f'Target {index} of the batch'
        missing = [key for key in ('boxes', 'labels') if not isinstance(target.get(key), torch.Tensor)]
        if missing:
            raise DetectionError(f'{name}: {missing[0]} is not a tensor. Give boxes (T, 4) and labels (T,).')
        boxes, labels = target['boxes'], target['labels']
        if boxes.shape != (len(labels), 4) or labels.dim() != 1:
            raise DetectionError(
                f'{name}: boxes have the shape {list(boxes.shape)} and labels {list(labels.shape)}. Expected (T, 4) '
                'and (T,), or (0, 4) and (0,) for an image without boxes.')
        if labels.dtype != torch.long:
            raise DetectionError(
                f'{name}: labels are {labels.dtype}. Give the numbers 0 to {num_classes - 1} as torch.int64.')
        invalid_labels = (labels < 0) | (labels >= num_classes)
        invalid_boxes = ~(boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
        if (invalid_labels | invalid_boxes).any():  # one test for both, because reading a value waits for the GPU
            if invalid_labels.any():
                raise DetectionError(
                    f'{name}: the label {labels[invalid_labels][0].item()} is out of range. The labels of a detector '
                    f'with num_classes={num_classes} are 0 to {num_classes - 1}. The background has no label: leave '
                    'out boxes without an object.')
            raise DetectionError(
                f'{name}: the box {boxes[invalid_boxes][0].tolist()} has no area. Give left, top, right and bottom in '
                'pixels, with left < right and top < bottom.')
