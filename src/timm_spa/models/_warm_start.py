"""Function-preserving start of a gated model from the weights of the plain one.

A gate is sigmoid(conv(...)). With the weights of that conv zero it is 1/2 everywhere. The gated map is linear in a few
parameters of the block: scale and shift of a norm layer (also with a ReLU behind it, which commutes with doubling), or
the weights of a convolution without bias. Twice these make the gated model equal to the plain one: doubling and halving
are exact in binary floating point.
"""
import logging
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn as nn

from ..layers import NoGate, SpatialPyramidAttention, SqueezeExcite

__all__ = ['checkpoint_filter_fn', 'warm_start']

_logger = logging.getLogger(__name__)


def _gated_blocks(model: nn.Module) -> Iterator[Tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, 'gated_parameters') and not isinstance(module.attn, NoGate):
            yield name, module


def warm_start(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Adds neutral gates to the weights of a plain model.

    Args:
        state_dict: Weights of the plain model, under timm's names.
        model: The gated model; its gates, as they are initialized, fill what the plain model lacks.

    Returns:
        Weights for `model`, with which it computes what the plain model does. The given ones are not changed.

    Raises:
        ValueError: The model's gate can't be neutral.
    """
    warm = dict(state_dict)
    for name, block in _gated_blocks(model):
        if not isinstance(block.attn, (SpatialPyramidAttention, SqueezeExcite)):
            raise ValueError(
                f'The weights are those of a plain model, and {type(model).__name__} has the gate {name}.attn that no '
                'weights make neutral. Load weights of the same model, or train from random initialization.')
        # the gated map is linear in these; where they are no part of the block, the block says of what they are
        prefix = getattr(block, 'gated_prefix', name)
        for key in (f'{prefix}.{parameter}' for parameter in block.gated_parameters):
            if key in warm:  # else load_state_dict reports it
                warm[key] = warm[key] * 2
        for key, value in block.attn.state_dict().items():
            warm[f'{name}.attn.{key}'] = torch.zeros_like(value) if key in ('fc2.weight', 'fc2.bias') else value
    return warm


def checkpoint_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
        plain_filter: Optional[Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]] = None,
) -> Dict[str, torch.Tensor]:
    """Prepares a checkpoint for loading: one without gates, for a model with gates, is a plain model's: a warm start.

    Args:
        state_dict: Weights of the gated or of the plain model, under timm's names.
        model: The gated model.
        plain_filter: Brings weights of the plain model to timm's names, if they may have others.

    Returns:
        Weights for `model`.
    """
    if any('.attn.' in key for key in state_dict) or next(_gated_blocks(model), None) is None:
        return state_dict
    _logger.warning(
        'The checkpoint holds no attention: it is the plain model. Its weights are loaded so that the model computes '
        'the same, with every gate neutral. Attention begins to act once the model is fine-tuned.')
    return warm_start(plain_filter(state_dict) if plain_filter else state_dict, model)
