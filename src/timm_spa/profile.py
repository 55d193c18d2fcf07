"""Parameters, multiply-adds and activations of models.

`python -m timm_spa.profile` counts all models and writes models.json, which `timm-spa list` reads.
"""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .checkpoints.files import replacing
from .models import list_models

__all__ = ['ModelCost', 'count_cost', 'describe']

LIST = Path(__file__).parent / 'models.json'


class ModelCost(NamedTuple):
    """Cost of a model for one image.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-adds of convolutions and linear layers.
        activations: Number of output values of convolutions and linear layers, as in timm's model cards.
    """
    parameters: int
    macs: int
    activations: int


def count_cost(model_name: str, input_size: Optional[Sequence[int]] = None, **kwargs: Any) -> ModelCost:
    """Counts the cost of a model on the meta device, without memory for its weights.

    Args:
        model_name: Name of a timm model.
        input_size: Channels, height and width of the image. Defaults to the model's input size.
        **kwargs: Arguments of `timm.create_model`.
    """
    model = timm.create_model(model_name, device=torch.device('meta'), **kwargs).eval()
    activations: List[int] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: activations.append(output.numel()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *(input_size or model.pretrained_cfg['input_size']), device='meta'))
    parameters = sum(p.numel() for p in model.parameters())
    return ModelCost(parameters, counter.get_total_flops() // 2, sum(activations))


def describe(model_name: str) -> Dict[str, Any]:
    """Returns the row of a model in models.json."""
    cost, cfg = count_cost(model_name), timm.get_pretrained_cfg(model_name, allow_unregistered=False)
    return dict(
        parameters=cost.parameters, macs=cost.macs, input='x'.join(map(str, cfg.input_size[1:])), tag=cfg.tag,
        tags=len(timm.list_pretrained(f'{model_name}.*')))


def main() -> None:
    """Writes models.json."""
    rows = [f'  {json.dumps(name)}: {json.dumps(describe(name))}' for name in list_models()]
    with replacing(LIST) as partial:
        partial.write_text('{\n' + ',\n'.join(rows) + '\n}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
