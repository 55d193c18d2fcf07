"""What timm's own entry points do for pretrained weights only, so that `gated` does it for every checkpoint."""
import contextlib
import inspect
import re
import sys
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
from timm.models import model_entrypoint

__all__ = ['plain_filter', 'pretrained_arguments']

# timm passes these with pretrained=True only: the same file would be another function with and without it
_PRETRAINED_ARGUMENTS: Dict[str, Dict[str, Any]] = {'fbnetc_100': dict(bn_eps=1e-3)}
# names of the functions in timm's files that bring published weights to the names of its models
FILTERS = ('checkpoint_filter_fn', '_filter_fn', '_filter_torchvision_pretrained')
# tensors of timm's published weights that its models do not have, for which timm loads the whole file non-strictly
_UNUSED = {
    'timm.models.dla': r'level\d+\.(?:tree\d\.)*project\.\d+\..*',
    'timm.models.inception_v3': r'AuxLogits\..*',
}


def pretrained_arguments(name: str) -> Dict[str, Any]:
    """Returns the arguments that timm gives a model for its pretrained weights, and not without them."""
    return dict(_PRETRAINED_ARGUMENTS.get(name, {}))


def plain_filter(name: str, model: nn.Module) -> Callable[[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]:
    """Returns a function that brings weights of a model of timm to the names that the model has now."""
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
