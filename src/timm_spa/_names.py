"""Checks of model names, and suggestions for misspelled names."""
import difflib
from typing import Iterable, Type

import timm

__all__ = ['check_model_name', 'did_you_mean']


def did_you_mean(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.4) -> str:
    """Returns ' Did you mean ...?' with the most similar known names, or an empty string without a similar name."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    return f' Did you mean {" or ".join(matches)}?' if matches else ''


def check_model_name(name: str, error: Type[Exception], prefix: str = '') -> None:
    """Raises `error` if timm does not know the model. Names with a source such as 'hf-hub:...' are not checked."""
    architecture = name.partition('.')[0]
    if ':' not in name and not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), cutoff=0.7)
        raise error(f'{prefix}Unknown model {name!r}.{hint or " timm.list_models() lists all names."}')
