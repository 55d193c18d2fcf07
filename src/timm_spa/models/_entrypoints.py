"""Entry points of models that differ only in their gate."""
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, List, Sequence, Tuple

import timm
import torch.nn as nn
from timm.models import model_entrypoint, register_model

from ._gate_table import GATES

__all__ = ['list_models', 'register_gated', 'split_gate']


def split_gate(name: str) -> Tuple[str, str, str]:
    """Splits a model's name, e.g. 'se_b_preresnet18_cifar', into base, gate ('se_b') and a description of the gate."""
    gate = max((gate for gate in GATES if name.startswith(f'{gate}_')), key=len, default='none')
    return name.removeprefix(f'{gate}_'), gate, GATES[gate].description


def register_gated(
        module: Dict[str, Any],
        names: Sequence[str],
        create: Callable[..., nn.Module],
        base_doc: Callable[[str], str],
) -> None:
    """Makes and registers an entry point for each name, as a member of the calling module.

    Args:
        module: Namespace of the module, its `globals()`. `default_cfgs` must be in it.
        names: Names of models: base names, with the name of a gate and an underscore in front.
        create: Called as `create(name, pretrained, base=base, gate=gate, **kwargs)`, with a base of one of the names.
        base_doc: Describes a base name, e.g. 'preresnet18_cifar' as 'Pre-activation ResNet-18 for 32x32 images'.
    """
    bases = sorted({split_gate(name)[0] for name in names})
    for name in names:
        base, gate, description = split_gate(name)

        def entrypoint(pretrained: bool = False, *, _name=name, _base=base, _gate=gate, **kwargs: Any) -> nn.Module:
            if str(kwargs.get('base', _base)).partition('.')[0] not in bases:
                raise ValueError(
                    f'base of {_name} must be one of {", ".join(bases)}, got {kwargs["base"]!r}. The model that takes '
                    'any CNN of timm as its base is gated.')
            return create(_name, pretrained, **dict(dict(base=_base, gate=_gate), **kwargs))

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__module__ = module['__name__']
        entrypoint.__doc__ = f'{base_doc(base)} with {description}.'
        module[name] = register_model(entrypoint)


def list_models(filter: str = '*', pretrained: bool = False) -> List[str]:
    """Lists the models of this package.

    Args:
        filter: Wildcard on the names; with `pretrained` on names and tags.
        pretrained: Names and tags that have weights, instead of names.

    Returns:
        Names, in timm's order.
    """
    package = __name__.partition('.')[0]
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__.partition('.')[0] == package]
    if not pretrained:
        return [name for name in names if fnmatchcase(name, filter)]
    return [tagged for tagged in timm.list_pretrained(filter) if tagged.partition('.')[0] in set(names)]
