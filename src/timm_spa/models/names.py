"""What a name was perhaps meant to be."""
import difflib
from typing import Iterable, Optional

import timm

__all__ = ['did_you_mean', 'unknown_model']


def did_you_mean(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.4) -> str:
    """Returns ' Did you mean ...?' with the most similar of the known names, or nothing if none is similar.

    Args:
        name: Name that is not known.
        known: The names that are.
        count: Most names to give.
        cutoff: Least similarity, from 0 to 1.
    """
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    return f' Did you mean {" or ".join(near)}?' if near else ''


def unknown_model(name: str) -> Optional[str]:
    """Returns what is wrong with the name of a model, None if timm knows it or it is an address of weights.

    Args:
        name: Architecture, a tag behind it or not, or e.g. 'hf-hub:organization/name'.
    """
    architecture = name.partition('.')[0]
    if ':' in name or timm.is_model(architecture):
        return None
    return f'There is no model {name!r}.{did_you_mean(architecture, timm.list_models(), cutoff=0.7)}'
