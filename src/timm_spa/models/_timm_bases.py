"""Steps of timm's entry points for pretrained weights. `gated` takes them for every checkpoint."""
import contextlib
import inspect
import re
import sys
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
from timm.models import model_entrypoint

__all__ = ['plain_filter', 'pretrained_arguments']

# timm passes these with pretrained=True only. Without them, the same weights compute another function.
_PRETRAINED_ARGUMENTS: Dict[str, Dict[str, Any]] = {'fbnetc_100': dict(bn_eps=1e-3)}
# functions in timm's model files that rename the tensors of published weights
FILTERS = ('checkpoint_filter_fn', '_filter_fn', '_filter_torchvision_pretrained')
# tensors of timm's published weights that its models lack; timm loads these files non-strictly
_UNUSED = {
    'timm.models.dla': r'level\d+\.(?:tree\d\.)*project\.\d+\..*',
    'timm.models.inception_v3': r'AuxLogits\..*',
}


def pretrained_arguments(name: str) -> Dict[str, Any]:
    """Returns the arguments that timm passes to a model only with pretrained=True."""
    return dict(_PRETRAINED_ARGUMENTS.get(name, {}))


def plain_filter(name: str, model: nn.Module) -> Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]:
    """Returns a function that renames published weights of a timm model to its present names."""
    file = model_entrypoint(name).__module__
    rename: Optional[Callable[..., Any]] = next(
        (getattr(sys.modules[file], name) for name in FILTERS if hasattr(sys.modules[file], name)), None)

    def filter_fn(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        named = dict(state_dict)
        if rename is not None:
            with contextlib.suppress(LookupError, RuntimeError, AttributeError):  # of a file of another network
                named = rename(dict(state_dict), *[model][:len(inspect.signature(rename).parameters) - 1])
        unused, own = _UNUSED.get(file, ''), model.state_dict()
        return {key: value for key, value in named.items() if key in own or not re.fullmatch(unused, key)}

    return filter_fn
