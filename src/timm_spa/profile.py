"""Size and cost of a model, counted and not looked up."""
from typing import Tuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_parameters_and_macs']


def count_parameters_and_macs(model_name: str) -> Tuple[int, int]:
    """Counts a model on the meta device, without memory for its weights.

    Args:
        model_name: Name of a model that timm knows.

    Returns:
        Number of parameters, and multiply-adds of the convolutions and linear layers for one image of the model's
        input size.
    """
    model = timm.create_model(model_name, device=torch.device('meta')).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
