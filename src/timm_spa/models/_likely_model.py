"""The model that tensors are probably of, read from their names and shapes, for error messages."""
import contextlib
import functools
import math
from typing import Any, Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Tuple

import timm
import torch
from timm.layers import GroupNorm1
from timm.models import model_entrypoint

from ._block_types import BLOCK_TYPES
from ._entrypoints import list_models, split_gate
from ._gate_table import GATES, create_gate, reads_block_input

__all__ = ['likely_model']

SLOT = '.attn.'
MOST_MODELS = 32  # of one file of timm; the variants with longer names are rarer
MOST_PLACES = 6  # that a command line can list
Shapes = Dict[str, Tuple[int, ...]]


def likely_model(tensors: Mapping[str, torch.Tensor], *names: str) -> str:
    """Returns a sentence with the model and the options that fit tensors with gates; '' if there is none.

    Args:
        tensors: Tensors by name.
        *names: Names of models that may be the plain network, or have other gates; they are tried first. '' is none.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    places: Dict[str, Dict[str, Tuple[int, ...]]] = {}
    for name in shapes:
        place, slot, key = name.rpartition(SLOT)
        if slot:
            places.setdefault(place, {})[key] = shapes[name]
    gate = _gate_of(list(places.values()))
    if gate is None:
        return ''
    asked = {name.partition('.')[0] for name in names if name}
    same_gate = any(split_gate(name)[1] == gate for name in asked)
    own = [name for name in _own_models(gate, shapes) if _fits(shapes, name)]
    if own:  # several may have the same tensors
        return '' if asked & set(own) else (
            f'Its tensors are probably those of {" or ".join(own)}: choose it with --model {own[0]}.')
    plain = {name: shape for name, shape in shapes.items() if SLOT not in name}
    gated = sorted({place.removesuffix('.drop') for place in places})
    for base in _candidates(plain, asked, search=not same_gate):
        where = _where(_names(shapes), base, gate, gated) if _fits(plain, base) else None
        if where is not None:
            options = ' '.join([f'base={base}', f'gate={gate}', *where, *_sizes(places, base, gate)])
            return f'Its tensors are probably those of gated: choose it with --model gated --model-kwargs {options}.'
    return '' if same_gate or 'gated' in asked else (
        f'Its tensors have gates of the kind {gate!r} and are probably those of the model gated: choose it with '
        f'--model gated --model-kwargs base=NAME gate={gate}, where NAME is the plain network.')


def _where(names: FrozenSet[str], base: str, gate: str, gated: List[str]) -> Optional[List[str]]:
    """Returns the option for the gated modules of a base, [] for the default; None if it does not have such gates."""
    with contextlib.suppress(ValueError, RuntimeError, TypeError):  # a base without blocks of a known type
        if _names(_shapes('gated', base=base, gate=gate)) == names:
            return []
    with contextlib.suppress(ValueError, RuntimeError, TypeError):  # a module that cannot be gated
        if _names(_shapes('gated', base=base, gate=gate, where=tuple(gated))) == names:
            shown = ','.join(f"'{place}'" for place in gated)
            return [f'where="({shown},)"' if len(gated) <= MOST_PLACES else 'where=..., the modules with gates']
    return None


def _sizes(places: Mapping[str, Shapes], base: str, gate: str) -> Iterator[str]:
    """Yields the sizes of gates that differ from the defaults."""
    # of the widest gate: narrow ones may have the smallest width, whatever the ratio
    place = max(places, key=lambda place: max(map(math.prod, places[place].values())))
    default = _shapes('gated', base=base, gate=gate, where=(place.removesuffix('.drop'),))
    for key, shape in places[place].items():
        expected = default[f'{place}{SLOT}{key}']
        if key == 'pyramid_weight' and shape != expected:
            yield f'pyramid_sizes=..., which are {shape[0]} numbers'
        elif key in ('fc1.weight', 'layer.fc1.weight') and shape != expected:
            yield f'rd_ratio={shape[0] / shape[1]:g}'


def _gate_of(gates: List[Shapes]) -> Optional[str]:
    """Returns the name of the gate whose tensors have the given names, if all gates are of the same kind."""
    kinds = {frozenset(gate) for gate in gates}
    matches = [name for name, names in _gate_names() if kinds and kinds <= set(names)]
    return matches[0] if matches else None


@functools.lru_cache
def _gate_names() -> List[Tuple[str, Tuple[FrozenSet[str], ...]]]:
    """Returns the names of the tensors of every gate that `add_attention` takes, with each norm layer."""
    def names(gate: str, norm_layer: Any) -> FrozenSet[str]:
        return frozenset(create_gate(gate, 64, 64, norm_layer=norm_layer, device='meta').state_dict())

    return [
        (gate, (names(gate, torch.nn.BatchNorm2d), names(gate, GroupNorm1)))
        for gate in GATES if not reads_block_input(gate) and GATES[gate].zeros]


def _own_models(gate: str, shapes: Shapes) -> Iterator[str]:
    """Yields models of this package with a gate, from the files whose models have the same outermost names."""
    files: Dict[str, List[str]] = {}
    for name in list_models(f'{gate}_*'):
        files.setdefault(model_entrypoint(name).__module__, []).append(name)
    for names in files.values():
        if _outermost(_shapes(names[0])) == _outermost(shapes):
            yield from names


def _candidates(plain: Shapes, names: Iterable[str], search: bool) -> Iterator[str]:
    """Yields plain models: the given ones, and with `search` those of timm's files with the same outermost names."""
    given = [split_gate(name)[0] for name in names]
    yield from dict.fromkeys(name for name in given if name != 'gated' and timm.is_model(name))
    if not search:
        return
    # files with blocks that other files define: EfficientNets, and HRNet with those of ResNet
    for file in [*(path.rpartition('.')[2] for path in BLOCK_TYPES), 'efficientnet', 'mobilenetv3', 'hrnet']:
        models = sorted(timm.list_models(module=file), key=lambda name: (len(name), name))
        models = [name for name in models if not name.startswith(tuple(f'{gate}_' for gate in GATES))]
        if models and _outermost(_shapes(models[0])) == _outermost(plain):
            yield from models[:MOST_MODELS]


def _outermost(shapes: Shapes) -> FrozenSet[str]:
    return frozenset(name.partition('.')[0] for name in shapes)


@functools.lru_cache(maxsize=256)
def _model(name: str, **kwargs: Any) -> Any:
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


@functools.lru_cache(maxsize=256)
def _shapes(name: str, **kwargs: Any) -> Shapes:
    """Returns the shapes of the tensors of a model."""
    return {key: tuple(tensor.shape) for key, tensor in _model(name, **kwargs).state_dict().items()}


def _names(shapes: Shapes) -> FrozenSet[str]:
    return frozenset(name for name in shapes if not name.endswith('.num_batches_tracked'))


def _fits(given: Shapes, name: str) -> bool:
    """Returns whether tensors are of a model, except for the number of classes and of image channels."""
    try:
        model = _model(name)
    except Exception:  # models without weights may raise any error
        return False
    own, cfg = _shapes(name), model.pretrained_cfg
    adapted = tuple(
        f'{layer}.' for key in ('classifier', 'first_conv') for layer in (
            [cfg[key]] if isinstance(cfg.get(key), str) else cfg.get(key) or ()))

    def fixed(shapes: Shapes) -> Shapes:
        return {key: shapes[key] for key in _names(shapes) if not key.startswith(adapted or '\n')}

    return _names(given) == _names(own) and fixed(given) == fixed(own)
