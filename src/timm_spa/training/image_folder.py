"""Opens image folders with timm, and checks their splits and class numbers."""
import logging
import os
from typing import Any, Callable, Dict, Iterable, List, Mapping, Set

from timm.data import create_dataset

from .._errors import TimmSpaError, UsageError
from ..checkpoints.fit import first_few

__all__ = [
    'SPLITS', 'class_names', 'class_numbers', 'is_image_folder', 'number_of_classes', 'open_dataset', 'renumbered',
    'split_folders']

SPLITS = frozenset(('train', 'training', 'val', 'valid', 'validation', 'test', 'testing', 'eval', 'evaluation'))
DATASET_TYPES = frozenset(('torch', 'hfds', 'hfids', 'tfds', 'wds'))  # prefixes of timm's dataset names

_logger = logging.getLogger(__name__)


def is_image_folder(name: str) -> bool:
    """Returns whether timm reads a dataset name as an image folder or tar file, and not e.g. `hfds/NAME`."""
    prefix, slash, kind = (name or '').partition('/')
    return not (slash and prefix.lower() in DATASET_TYPES) or (prefix.lower(), kind.lower()) in (
        ('torch', 'folder'), ('torch', 'image_folder'))


def class_numbers(dataset: Any) -> Dict[str, int]:
    """Returns the class numbers of a timm dataset by name, empty if unknown."""
    source = getattr(dataset, 'reader', dataset)
    numbers = getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None) or {}
    return dict(numbers) if all(isinstance(number, int) for number in numbers.values()) else {}


def class_names(numbers: Mapping[str, int]) -> List[str]:
    """Returns class names in the order of their numbers, empty if a number is missing or duplicate."""
    names = {number: str(name) for name, number in numbers.items() if name != ''}
    unique = len(names) == len([name for name in numbers if name != ''])
    return [names[number] for number in sorted(names)] if unique and sorted(names) == [*range(len(names))] else []


def number_of_classes(numbers: Mapping[str, int]) -> int:
    """Returns the number of outputs that a class map needs; an empty last line of its file does not count."""
    return max((number for name, number in numbers.items() if name), default=-1) + 1


def split_folders(root: Any, files: Iterable[str]) -> List[str]:
    """Finds the split folders in an image folder.

    A folder that contains images directly is a class, whatever its name. A folder of class folders is a split if it has
    a usual name, or if it shares most of its class names with another folder.

    Args:
        root: Folder to search.
        files: Paths of the images below it.

    Returns:
        Names of the split folders, sorted.
    """
    classes: Dict[str, Set[str]] = {}
    for file in files:
        top, *rest = os.path.relpath(file, root).split(os.sep)
        if len(rest) > 1:
            classes.setdefault(top, set()).add(rest[-2])
    return sorted(
        top for top, names in classes.items() if top.lower() in SPLITS or any(
            2 * len(names & others) > min(len(names), len(others)) for o, others in classes.items() if o != top))


def open_dataset(
        name: str,
        root: Any,
        split: str,
        option: str = '--split',
        create: Callable[..., Any] = create_dataset,
        **kwargs: Any,
) -> Any:
    """Opens a dataset with timm. Raises if the split does not exist, where timm would read all splits together.

    Args:
        name: Name of the dataset; an empty name is an image folder or tar file.
        root: Folder of the data.
        split: Name of the split.
        option: Option that sets the split, for messages.
        create: timm's `create_dataset`.
        **kwargs: Further arguments of `create_dataset`.

    Returns:
        The dataset.

    Raises:
        UsageError: The data cannot be read, or the split does not exist.
    """
    if is_image_folder(name) and not root:
        raise UsageError(f'The data of split {split!r} cannot be read: no folder given. Add --data-dir FOLDER.')
    try:
        dataset = create(name, root=root, split=split, **kwargs)
    except (TimmSpaError, ModuleNotFoundError):
        raise
    except Exception as e:  # timm's readers raise errors of many types
        missing = bool(root) and not os.path.exists(root)
        cause = 'it does not exist' if missing else ' '.join(str(e).split()).rstrip('.') or type(e).__name__
        class_map = ' and --class-map' if kwargs.get('class_map') else ''
        raise UsageError(
            f'The data of split {split!r} cannot be read from {root or name}: {cause}. Check --data-dir{class_map}.'
        ) from e
    source = getattr(dataset, 'reader', dataset)
    # timm reads the whole folder if the folder of the split does not exist
    if root and os.path.isdir(root) and os.path.realpath(getattr(source, 'root', '') or '') == os.path.realpath(root):
        splits = split_folders(root, (file for file, _ in getattr(source, 'samples', ())))
        if splits:
            raise UsageError(
                f'Split {split!r} not found in {root}: timm would read all its folders together. Set {option} to one '
                f'of {", ".join(splits)}.')
    return dataset


def renumbered(
        dataset: Any,
        expected: Mapping[str, int],
        origin: str,
        remedy: str,
        reopen: Callable[..., Any],
) -> Any:
    """Returns the dataset of an image folder with the class numbers of a model.

    Args:
        dataset: Dataset with timm's class numbers.
        expected: Class numbers of the model, by name.
        origin: Source of these numbers, for messages.
        remedy: Last sentence of the message about unknown classes.
        reopen: Opens the dataset again with the argument `class_map`.

    Returns:
        The dataset, opened again if timm's numbers differ.

    Raises:
        UsageError: The folder contains classes that the model does not have.
    """
    root, own = getattr(dataset, 'reader', dataset).root, class_numbers(dataset)
    unknown = [name for name in own if name not in expected]
    if unknown:
        raise UsageError(
            f'{root} has class folders that are not among the {len(expected)} classes of {origin}: '
            f'{first_few(unknown)}. {remedy}')
    if all(expected[name] == number for name, number in own.items()):
        return dataset
    if not hasattr(dataset, 'reader'):
        raise UsageError(
            f'{root} has {len(own)} of the {len(expected)} classes of {origin}, and torchvision would number them from '
            '0 on. Remove --dataset: timm reads the same folders and keeps the numbers.')
    _logger.info(f'{root} has {len(own)} of {len(expected)} classes, numbered as in {origin}.')
    return reopen(class_map=dict(expected))
