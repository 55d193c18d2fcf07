"""Names of a model's classes."""
from typing import Any, Dict, List, Optional, Union

import torch.nn as nn
from timm.data import ImageNetInfo

from .._names import did_you_mean
from ..checkpoints.fit import first_few
from .loading import ModelError, numbered

__all__ = ['check_classifier', 'class_names', 'find_class', 'own_labels']


def check_classifier(model: Any, error: type = ModelError) -> None:
    """Raises the given error unless the model has a number of classes and a configuration, as timm's models have."""
    missing = [name for name in ('num_classes', 'pretrained_cfg') if getattr(model, name, None) is None]
    if missing:
        raise error(
            f'{type(model).__name__} is not a classifier of timm: it lacks {" and ".join(missing)}. Create the model '
            'with timm.create_model, and without features_only.')


def class_names(model: nn.Module) -> List[Dict[str, Optional[str]]]:
    """Returns the names of a model's classes.

    Args:
        model: A timm model.

    Returns:
        A dictionary with 'label' and 'name' for each class. The names come from the model's configuration. Without
        names there, 1000 classes get ImageNet's names, and other classes get numbers.

    Raises:
        ModelError: The model is not a classifier of timm, e.g. it was created with `features_only`.
    """
    check_classifier(model)
    cfg: Any = model.pretrained_cfg
    count: Any = model.num_classes
    labels = own_labels(model)
    if labels:
        descriptions = cfg.get('label_descriptions') or {}
        return [dict(label=label, name=descriptions.get(label, label)) for label in labels]
    if count == 1000 and not cfg.get('label_names'):
        imagenet = ImageNetInfo()
        return [
            dict(label=imagenet.index_to_label_name(i), name=imagenet.index_to_description(i)) for i in range(count)]
    return [dict(label=None, name=name) for name in numbered(count)]


def own_labels(model: Any) -> List[str]:
    """Returns the labels in a model's configuration.

    The list is empty if the number of labels differs from the number of classes, or if the labels are only numbers.
    """
    labels = list(model.pretrained_cfg.get('label_names') or ())
    return labels if len(labels) == model.num_classes and labels != numbered(len(labels)) else []


def find_class(model: nn.Module, label: Union[str, int]) -> int:
    """Finds a class of a model by its label, its name or its number.

    Labels and names take precedence over numbers: a class called '3' may have another number. Upper and lower case
    are distinguished only if two names differ in nothing else.

    Args:
        model: A timm model.
        label: Label or name from `class_names`, or a number from 0.

    Returns:
        The number of the class.

    Raises:
        ModelError: No class matches, or several match. The message suggests the nearest name or lists the matches.
    """
    names, wanted = class_names(model), str(label)
    texts = [{str(text) for text in entry.values() if text is not None} for entry in names]
    matches = [i for i, own in enumerate(texts) if wanted in own] or [
        i for i, own in enumerate(texts) if wanted.casefold() in map(str.casefold, own)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = first_few([f'{i} ({names[i]["label"]})' for i in matches])
        raise ModelError(
            f'The class {wanted!r} is ambiguous: {len(matches)} classes of the model match. Give the number or the '
            f'label of one of them: {shown}.')
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    hint = did_you_mean(wanted, [str(entry['name']) for entry in names], 1)
    raise ModelError(
        f'The model does not have the class {wanted!r}.{hint} A number from 0 to {len(names) - 1} also selects a '
        'class.')
