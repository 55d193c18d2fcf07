"""What a name was perhaps meant to be."""
import difflib
from typing import Iterable, Type

import timm

__all__ = ['check_model_name', 'did_you_mean']


def did_you_mean(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.4) -> str:
    """Returns ' Did you mean ...?' with the most similar of the known names, or nothing if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    return f' Did you mean {" or ".join(near)}?' if near else ''


def check_model_name(name: str, error: Type[Exception], prefix: str = '') -> None:
    """Raises an error with the most similar names if timm has no such model; addresses such as 'hf-hub:...' pass."""
    architecture = name.partition('.')[0]
    if ':' not in name and not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), cutoff=0.7)
        raise error(f'{prefix}There is no model {name!r}.{hint}')
