"""Registration of models that differ only in their gate."""
import sys
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, Iterable, List, Tuple

import timm
import torch.nn as nn
from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint, register_model

from ._gate_table import GATES

__all__ = ['Family', 'list_models', 'split_gate']


def split_gate(name: str) -> Tuple[str, str, str]:
    """Splits a model's name, e.g. 'se_b_preresnet18_cifar', into base, gate ('se_b') and a description of the gate."""
    prefixes = (gate for gate, row in GATES.items() if row.is_prefix and name.startswith(f'{gate}_'))
    gate = max(prefixes, key=len, default='none')
    return name.removeprefix(f'{gate}_'), gate, GATES[gate].description


class Family:
    """Registers the models of one file, one call per name: `spa_resnet50 = register('spa_resnet50')`."""

    def __init__(
            self,
            module: str,
            create: Callable[..., nn.Module],
            bases: Iterable[str],
            describe: Callable[[str], str],
            make_cfgs: Callable[[str], Dict[str, PretrainedCfg]],
    ):
        """
        Args:
            module: `__name__` of the file. timm reads the configurations from its dictionary `default_cfgs`.
            create: Called as `create(name, pretrained, base=base, gate=gate, **kwargs)`, with one of the bases.
            bases: Names of the models without attention, as they stand behind the name of a gate.
            describe: Describes a base, e.g. 'preresnet18_cifar' as 'Pre-activation ResNet-18 for 32x32 images'.
            make_cfgs: Makes the pretrained configurations of a model by tag, the default first.
        """
        self.module = module
        self.create = create
        self.bases = tuple(bases)
        self.describe = describe
        self.make_cfgs = make_cfgs

    def __call__(self, name: str) -> Callable[..., nn.Module]:
        """Registers a model with timm and returns its entry point.

        Args:
            name: Name of a base, with the name of a gate and an underscore in front: 'se_b_preresnet18_cifar'.
        """
        base, gate, description = split_gate(name)

        def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            given = str(kwargs.get('base', base))
            if given.partition('.')[0] not in self.bases:
                raise ValueError(
                    f'base of {name} must be one of {", ".join(self.bases)}, got {given!r}. Use the model gated for '
                    'another CNN of timm.')
            return self.create(name, pretrained, **dict(dict(base=base, gate=gate), **kwargs))

        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__module__ = self.module
        entrypoint.__doc__ = f'{self.describe(base)} with {description}.'
        sys.modules[self.module].default_cfgs.update(generate_default_cfgs(self.make_cfgs(name)))
        return register_model(entrypoint)


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
