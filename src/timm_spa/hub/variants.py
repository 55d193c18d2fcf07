"""Weights of a model for one with other gates, where both compute the same function.

A gate that learned something can be carried over only to a gate that reads the same map in the same way: SPA-B and
SPA-C are the same layer in a block that keeps its channels; a pyramid of more sizes is one of fewer with weight 0 for
those that it lacks; and squeeze-and-excitation is SPA with the global size alone. A gate that learned nothing, a
constant 1/2, can be carried over to any that can be constant.
"""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ..layers import NoGate, SpatialPyramidAttention, SqueezeExcite
from ..models._pretrained import shortened
from .checkpoint import CheckpointError

__all__ = ['convert_variant']


def convert_variant(source: nn.Module, target: nn.Module) -> Dict[str, torch.Tensor]:
    """Converts the weights of a model to those of the same net with another gate.

    Args:
        source: Model with the weights.
        target: Model without.

    Returns:
        Weights for `target`, with which it computes in eval mode what `source` does. In training mode they differ where
        the gate of `target` has a norm layer that that of `source` lacks.

    Raises:
        CheckpointError: A gate of `source` cannot be had in `target`; the message says which and why.
    """
    gates: Dict[str, Any] = dict(_gates(source))
    weights = {
        name: tensor for name, tensor in source.state_dict().items() if '.attn.' not in name}
    reasons: Dict[str, str] = {}
    for name, gate in _gates(target):
        reason = _other_function(gates.get(name), gate)
        if reason is None:
            converted = _carried_over(gates[name], gate)
        elif _is_constant(gates.get(name)) and _can_be_constant(gate):
            converted = _constant(gate)
        else:
            reasons[name] = reason
            continue
        weights.update({f'{name}.{key}': value for key, value in converted.items()})
    if reasons:
        said = '; '.join(
            f'{reason}: {shortened([n for n, r in reasons.items() if r == reason], 3)}'
            for reason in sorted(set(reasons.values())))
        raise CheckpointError(
            f'No weights make these gates compute what the trained ones do ({said}). Start from weights of the plain '
            'net, or train from random initialization.')
    return weights


def _gates(model: nn.Module) -> List[Tuple[str, Any]]:
    return [(f'{name}.attn', module.attn) for name, module in model.named_modules() if hasattr(module, 'attn')]


def _other_function(source: Any, target: Any) -> Optional[str]:
    """Says why a gate with learned values cannot be had in another; None if it can."""
    kinds = (SpatialPyramidAttention, SqueezeExcite)
    if not isinstance(source, kinds) or not isinstance(target, SpatialPyramidAttention):
        return f'{_called(source)} is no {_called(target)}'
    if source.reads_block_input != target.reads_block_input:
        return "one reads the block's input, the other the map that it gates"
    if isinstance(source.matcher, nn.Identity) != isinstance(target.matcher, nn.Identity):
        return "only one matches the channels of the block's input, which is not linear"
    for layer in ('matcher', 'fc1', 'fc2'):
        ours, theirs = (getattr(gate, layer).state_dict() for gate in (target, source))
        if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
            return 'the widths differ'
    if isinstance(source, SqueezeExcite):
        return None if 1 in target.pyramid_sizes else 'the pyramid lacks the global size'
    if source.pyramid_sizes[0] != target.pyramid_sizes[0]:
        return f'the largest size of the pyramids is {source.pyramid_sizes[0]} and {target.pyramid_sizes[0]}'
    lost = [
        size for size, weight in zip(source.pyramid_sizes, source.pyramid_weight.tolist(), strict=True)
        if weight and size not in target.pyramid_sizes]
    return f'the pyramid lacks {", ".join(map(str, lost))}' if lost else None


def _carried_over(source: Any, target: Any) -> Dict[str, torch.Tensor]:
    weights = {key: value for key, value in source.state_dict().items() if key != 'pyramid_weight'}
    pyramid = torch.zeros_like(target.pyramid_weight.detach())
    if isinstance(source, SqueezeExcite):
        pyramid[target.pyramid_sizes.index(1)] = 1
        identity = {key: value.clone() for key, value in target.bn.state_dict().items()}
        identity['running_var'].fill_(1 - target.bn.eps)  # and the layer's own eps makes it 1
        identity['running_mean'].zero_()
        identity['weight'].fill_(1)
        identity['bias'].zero_()
        weights.update({f'bn.{key}': value for key, value in identity.items()})
    else:
        for size, weight in zip(source.pyramid_sizes, source.pyramid_weight.detach(), strict=True):
            if size in target.pyramid_sizes:
                pyramid[target.pyramid_sizes.index(size)] = weight
    return dict(weights, pyramid_weight=pyramid)


def _is_constant(gate: Any) -> bool:
    """Whether a gate is 1/2 whatever it reads."""
    return _can_be_constant(gate) and not gate.fc2.weight.any()


def _can_be_constant(gate: Any) -> bool:
    return isinstance(gate, (SpatialPyramidAttention, SqueezeExcite))


def _constant(gate: Any) -> Dict[str, torch.Tensor]:
    weights = {key: value.clone() for key, value in gate.state_dict().items()}
    return dict(weights, **{'fc2.weight': torch.zeros_like(weights['fc2.weight'])})


def _called(gate: Any) -> str:
    if isinstance(gate, SpatialPyramidAttention):
        return f'SPA-{gate.variant.upper()}'
    if gate is None or isinstance(gate, NoGate):
        return 'a block without a gate'
    return type(gate).__name__
