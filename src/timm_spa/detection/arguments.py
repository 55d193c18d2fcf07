"""Types and limits of a detector's arguments, in Python and in the config.json of a checkpoint."""
import math
from pathlib import Path
from typing import Any, Mapping, Union

from .backbone import DetectionError

__all__ = ['check_arguments', 'check_config']

# smallest and largest value: an untrusted checkpoint must not exhaust the memory
WHOLE_NUMBERS = dict(
    num_classes=(1, 100_000), trainable_layers=(0, 5), min_size=(1, 4096), max_size=(1, 8192),
    detections_per_img=(1, 100_000), topk_candidates=(1, 100_000), batch_size_per_image=(1, 100_000))
FRACTIONS = ('score_thresh', 'nms_thresh', 'fg_iou_thresh', 'bg_iou_thresh', 'positive_fraction')
TEXTS = ('detector', 'backbone')
COLOURS = ('image_mean', 'image_std')


def check_arguments(config: Mapping[str, Any], source: Union[str, Path]) -> None:
    """Checks the types and values of a detector's arguments.

    Args:
        config: Arguments by name. Unknown names are ignored.
        source: Detector or file, for the error message.

    Raises:
        DetectionError: An argument has another type, or is out of range.
    """
    def expect(valid: bool, key: str, expected: str) -> None:
        if not valid:
            shown = repr(config[key])
            shown = shown if len(shown) <= 60 else f'{shown[:60]}...'
            raise DetectionError(f'{source}: {key} must be {expected}, got {shown}.')

    for key, value in config.items():
        if key in TEXTS:
            expect(isinstance(value, str), key, 'a name')
        elif key in WHOLE_NUMBERS:
            smallest, largest = WHOLE_NUMBERS[key]
            expect(
                type(value) is int and smallest <= value <= largest, key,
                f'a whole number from {smallest} to {largest}')
        elif key in FRACTIONS:
            expect(_is_number(value) and 0 <= value <= 1, key, 'a number from 0 to 1')
        elif key in COLOURS:
            positive = key == 'image_std'
            valid = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_number, value))
            valid = valid and (not positive or min(value) > 0)
            expect(value is None or valid, key, f'three {"positive " if positive else ""}numbers')
        elif key == 'backbone_kwargs':
            valid = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
            expect(value is None or valid, key, 'a dictionary of names and values')
    if 'bg_iou_thresh' in config or 'fg_iou_thresh' in config:
        # torchvision's defaults where one is missing
        expect(
            config.get('bg_iou_thresh', 0.4) <= config.get('fg_iou_thresh', 0.5),
            'bg_iou_thresh' if 'bg_iou_thresh' in config else 'fg_iou_thresh',
            'such that bg_iou_thresh <= fg_iou_thresh (defaults: 0.4 and 0.5)')


def check_config(config: Mapping[str, Any], source: Union[str, Path]) -> None:
    """Checks the arguments in a config.json.

    Args:
        config: Arguments by name.
        source: Detector or file, for the error message.

    Raises:
        DetectionError: An argument is unknown, has another type, or is out of range.
    """
    known = {*TEXTS, *WHOLE_NUMBERS, *FRACTIONS, *COLOURS, 'backbone_kwargs'}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise DetectionError(
            f'{source}: unsupported arguments in a checkpoint: {", ".join(unknown)}. Supported are '
            f'{", ".join(sorted(known))}.')
    check_arguments(config, source)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
