"""Base class of the gated networks, and helpers to take over modules of timm."""
from typing import Any, Callable, Dict, List

import torch.nn as nn

from ..layers.torchscript import ignore

__all__ = ['GatedNet', 'adopt', 'divide_reduction']


class GatedNet:
    """Initialization of every parameter and buffer. Comes before timm's class among the bases of a model.

    A family has a method `init_convs`, which initializes convolutions and linear layers as timm does.
    """
    init_convs: Callable[..., None]  # Python 3.10: TorchScript takes Any for a constant

    @ignore
    def init_weights(self: Any, **kwargs: Any) -> None:
        """Initializes every parameter and buffer, also of a model made on the meta device and moved by `to_empty`."""
        for module in self.modules():
            # the weights of convolutions without bias are left to the family
            if hasattr(module, 'reset_parameters') and not (isinstance(module, nn.Conv2d) and module.bias is None):
                module.reset_parameters()
        self.init_convs(**kwargs)


def adopt(module: nn.Module, original: nn.Module) -> None:
    """Initializes a module with the content of another one, in place of `super().__init__`.

    The original must not be used afterwards.
    """
    nn.Module.__init__(module)
    module.__dict__.update(original.__dict__)


def divide_reduction(feature_info: List[Dict[str, Any]], first: int, others: int) -> None:
    """Divides the reduction in timm's feature info, where stem and pooling keep the resolution."""
    for i, info in enumerate(feature_info):
        info['reduction'] //= others if i else first
