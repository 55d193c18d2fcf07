"""What every gated family adds to its timm base class."""
from typing import Any, Callable, Dict, List

import torch
import torch.nn as nn

__all__ = ['GatedNet', 'adopt', 'divide_reduction']


class GatedNet:
    """Initialization of every parameter and buffer. Comes before timm's class among the bases of a model.

    A family has a method `init_convs`, which initializes convolutions and linear layers as timm does.
    """
    init_convs: Callable[..., None]  # Python 3.10: TorchScript takes Any for a constant

    @torch.jit.ignore
    def init_weights(self: Any, **kwargs: Any) -> None:
        """Initializes every parameter and buffer, also of a model made on the meta device and moved by `to_empty`.

        Args:
            **kwargs: Arguments of timm's `init_weights` of the family, if it has one.
        """
        for module in self.modules():
            # the weights of convolutions without bias are left to the family
            if hasattr(module, 'reset_parameters') and not (isinstance(module, nn.Conv2d) and module.bias is None):
                module.reset_parameters()
        self.init_convs(**kwargs)


def adopt(module: nn.Module, original: nn.Module) -> None:
    """Initializes a module with layers and attributes of another one, in place of `super().__init__`.

    Args:
        module: Module to initialize.
        original: Module as timm built it, not to be used any more.
    """
    nn.Module.__init__(module)
    module.__dict__.update(original.__dict__)


def divide_reduction(feature_info: List[Dict[str, Any]], first: int, others: int) -> None:
    """Corrects timm's reduction of a net whose stem was replaced by one that keeps the resolution.

    Args:
        feature_info: The net's description of its feature maps.
        first: What timm counts too much for the first map: the stride of its stem.
        others: What it counts too much for the others: stem and pooling.
    """
    for i, info in enumerate(feature_info):
        info['reduction'] //= others if i else first
