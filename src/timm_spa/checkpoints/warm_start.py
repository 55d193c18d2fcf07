"""Function-preserving start of a gated model from the weights of the plain model.

A gate is sigmoid(conv(...)). If the weights of this convolution are zero, the gate is 1/2 everywhere. The gated feature
map is linear in a few parameters of the block: scale and shift of a norm layer (also if a ReLU follows, which commutes
with doubling), or the weights of a convolution. Doubling these parameters makes the gated model equal to the plain
model. Doubling and halving are exact in binary floating point. Gates of two factors need two doublings, gates that add
to the feature map need none.
"""
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn

__all__ = ['checkpoint_filter_fn', 'gate_weights', 'gated_modules', 'has_gates', 'neutral_factors', 'warm_start']

_COMMUTE_WITH_DOUBLING = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)


def gated_modules(model: nn.Module) -> Iterator[Tuple[str, Any]]:
    """Yields name and module of everything in a model that has a gate, its child `attn`.

    `gated_parameters` names the tensors in which the gated feature map is linear, relative to the module or to its
    `gated_prefix`. `inverse_parameters` names tensors that undo the doubling for other readers of the feature map.
    `gated_activation` names an activation between these tensors and the gate.
    """
    for name, module in model.named_modules():
        if hasattr(module, 'gated_parameters') and module.attn.gate_name != 'none':
            yield name, module


def gate_weights(model: nn.Module) -> List[str]:
    """Returns the names of the tensors of a model's gates."""
    return [f'{name}.attn.{key}' for name, module in gated_modules(model) for key in module.attn.state_dict()]


def has_gates(names: Iterable[str], model: nn.Module) -> bool:
    """Returns whether tensors of a model's gates are among the names; the network may have its own layers `attn`."""
    return not set(gate_weights(model)).isdisjoint(names)


def neutral_factors(model: nn.Module, gates: Mapping[str, Any]) -> Dict[str, float]:
    """Returns the tensors that change when the gates of a model become neutral, and their factors.

    Args:
        model: Model with gates.
        gates: The table of gates, `timm_spa.models.GATES`.

    Raises:
        ValueError: No weights make a gate neutral.
    """
    factors: Dict[str, float] = {}
    for name, module in gated_modules(model):
        # a gate outside of the table has its neutral setting itself
        gate, prefix = gates.get(module.attn.gate_name, module.attn), getattr(module, 'gated_prefix', name)
        if gate.doublings is None:
            raise ValueError(
                f'{name}.attn cannot be neutral: the gate {module.attn.gate_name!r} has no neutral weights. Train from '
                'scratch with neutral=False.')
        factors.update({f'{name}.attn.{key}': 0. for key in gate.zeros})
        if not gate.doublings:
            continue
        act = getattr(module, getattr(module, 'gated_activation', ''), None)
        if act is not None and not isinstance(act, _COMMUTE_WITH_DOUBLING):
            raise ValueError(
                f'{name}.attn cannot be neutral after a {type(act).__name__}, which does not commute with doubling. '
                'Use ReLU, LeakyReLU or PReLU as act_layer, or train from scratch.')
        factors.update({f'{prefix}.{key}': 2. ** gate.doublings for key in module.gated_parameters})
        factors.update({f'{prefix}.{key}': .5 ** gate.doublings for key in getattr(module, 'inverse_parameters', ())})
    return factors


def warm_start(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
        gates: Mapping[str, Any],
        neutral: bool = True,
) -> Dict[str, torch.Tensor]:
    """Returns the weights of a plain model with those of the gates added, neutral or as initialized."""
    warm = dict(state_dict)
    for name, module in gated_modules(model):
        warm.update({f'{name}.attn.{key}': value for key, value in module.attn.state_dict().items()})
    for key, factor in neutral_factors(model, gates).items() if neutral else ():
        if key in warm:  # else load_state_dict reports it
            warm[key] = warm[key] * factor
    return warm


def checkpoint_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
        gates: Mapping[str, Any],
        plain_filter: Optional[Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]] = None,
        neutral: bool = True,
) -> Dict[str, torch.Tensor]:
    """Prepares a checkpoint for loading. A checkpoint without weights of gates is a plain model's: a warm start."""
    if has_gates(state_dict, model):
        return state_dict
    plain = plain_filter(state_dict) if plain_filter else state_dict
    return warm_start(plain, model, gates, neutral) if gate_weights(model) else plain
