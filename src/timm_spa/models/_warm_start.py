"""Function-preserving start of a gated model from the weights of the plain one.

A gate is sigmoid(conv(...)). With the weights of that conv zero it is 1/2 everywhere. The gated map is the output of a
norm layer with scale and shift, so twice the scale and twice the shift make the gated model equal to the plain one:
doubling and halving are exact in binary floating point.
"""
import logging
from typing import Dict

import torch
import torch.nn as nn

__all__ = ['checkpoint_filter_fn', 'warm_start']

_logger = logging.getLogger(__name__)


def warm_start(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Adds neutral gates to the weights of a plain model.

    Args:
        state_dict: Weights of the plain model, under timm's names.
        model: The gated model; its gates, as they are initialized, fill what the plain model lacks.

    Returns:
        Weights for `model`, with which it computes what the plain model does. The given ones are not changed.
    """
    warm = dict(state_dict)
    for name, block in model.named_modules():
        gated_norm = getattr(block, 'gated_norm', None)
        if gated_norm is None:
            continue
        for key in (f'{name}.{gated_norm}.weight', f'{name}.{gated_norm}.bias'):
            if key in warm:  # else load_state_dict reports it
                warm[key] = warm[key] * 2
        for key, value in block.attn.state_dict().items():
            warm[f'{name}.attn.{key}'] = torch.zeros_like(value) if key == 'fc2.weight' else value
    return warm


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Prepares a checkpoint for loading: one without any gate is taken for a plain model's and warm-started.

    Args:
        state_dict: Weights of the gated or of the plain model, under timm's names.
        model: The gated model.

    Returns:
        Weights for `model`.
    """
    if any('.attn.' in key for key in state_dict):
        return state_dict
    _logger.warning(
        'The checkpoint holds no attention: it is the plain model. Its weights are loaded so that the model computes '
        'the same, with every gate neutral. Attention begins to act once the model is fine-tuned.')
    return warm_start(state_dict, model)
