"""Names of a model's classes."""
from typing import Any, Dict, List, Optional, Union

import torch.nn as nn
from timm.data import ImageNetInfo

from .._names import did_you_mean
from ..checkpoints.fit import first_few
from .loading import ModelError, numbered

__all__ = ['check_classifier', 'class_names', 'find_class', 'own_labels']


def check_classifier(model: Any, error: type = ModelError) -> None:
    """Raises an error of the given type unless a model has a number of classes and a configuration, as timm's have."""
    missing = [name for name in ('num_classes', 'pretrained_cfg') if getattr(model, name, None) is None]
    if missing:
        raise error(
            f'{type(model).__name__} is not a classifier of timm: it has no {" and no ".join(missing)}. Create the '
            'model with timm.create_model, and without features_only.')


def class_names(model: nn.Module) -> List[Dict[str, Optional[str]]]:
    """Names the classes of a model.

    Args:
        model: A timm model.

    Returns:
        For each class its 'label' and its 'name': from the model's configuration, else ImageNet's for 1000 classes,
        else numbers.

    Raises:
        ModelError: The model is not a classifier of timm, e.g. made with `features_only`.
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
    """Returns the labels in a model's configuration, none if they are of another number or only the numbers."""
    labels = list(model.pretrained_cfg.get('label_names') or ())
    return labels if len(labels) == model.num_classes and labels != numbered(len(labels)) else []


def find_class(model: nn.Module, label: Union[str, int]) -> int:
    """Finds a class of a model by its label, its name or its number.

    A label or a name comes before a number: a class that is called 3 may have another number. The case of letters
    matters only where two names differ in nothing else.

    Args:
        model: A timm model.
        label: Label or name, as `class_names` has them, or a number from 0.

    Returns:
        The number of the class.

    Raises:
        ModelError: No class, or more than one, is called so; the message has the nearest name, or the numbers.
    """
    names, wanted = class_names(model), str(label)
    called = [{str(text) for text in entry.values() if text is not None} for entry in names]
    matches = [i for i, texts in enumerate(called) if wanted in texts] or [
        i for i, texts in enumerate(called) if wanted.casefold() in map(str.casefold, texts)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = first_few([f'{i} ({names[i]["label"]})' for i in matches])
        raise ModelError(
            f'The model has {len(matches)} classes {wanted!r}. Give the number or the label of one: {shown}.')
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    hint = did_you_mean(wanted, [str(entry['name']) for entry in names], 1)
    raise ModelError(
        f'The model has no class {wanted!r}.{hint} Its {len(names)} classes have numbers too, from 0 to '
        f'{len(names) - 1}.')
