"""Feature extractors of timm as parts of the whole network: their gates and weights."""
from typing import Any, Dict, List

import torch
import torch.nn as nn
from timm.models import FeatureHookNet
from timm.models._features import FeatureGetterNet

from ..checkpoints.warm_start import gate_weights, gated_modules, has_gates

__all__ = ['EXTRACTOR_ARGUMENTS', 'Part']

# arguments of timm.create_model that the whole network does not take
EXTRACTOR_ARGUMENTS = ('features_only', 'out_indices', 'feature_cls', 'feature_cfg')


class Part:
    """A feature extractor and the whole network that it is a part of.

    Attributes:
        places: Names, in the extractor, of the modules that have gates in the whole network. The list is empty for an
            extractor that ends before the first of them.
    """

    def __init__(self, extractor: nn.Module, whole: nn.Module):
        """
        Args:
            extractor: Feature extractor without gates; they may be added afterwards.
            whole: Network with gates.
        """
        self.extractor, self.whole = extractor, whole
        wrapped = isinstance(extractor, FeatureGetterNet) or (
            isinstance(extractor, FeatureHookNet) and list(extractor) == ['body'])
        self.prefix = f'{next(iter(dict(extractor.named_children())))}.' if wrapped else ''
        modules = {self._flat(name): name for name, _ in extractor.named_modules()}
        gated = [self._flat(getattr(module, 'gated_prefix', name)) for name, module in gated_modules(whole)]
        self.places: List[str] = [modules[name] for name in gated if name in modules]

    def _flat(self, name: str) -> str:
        return name.removeprefix(self.prefix).replace('.', '_')  # as timm renames the modules of an extractor

    def _names(self) -> Dict[str, str]:
        """Returns the names in the whole network of the extractor's tensors."""
        names = {self._flat(name): name for name in self.whole.state_dict()}
        return {name: names.get(self._flat(name), name) for name in self.extractor.state_dict()}

    def completed(self, state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Returns a checkpoint of the whole network; one of the extractor gets the tensors that it lacks."""
        names = self._names()
        named = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        part, gates = set(names.values()), set(gate_weights(self.whole))
        if not part - gates <= named.keys() <= part:
            return state_dict
        rest = {name: tensor for name, tensor in self.whole.state_dict().items() if name not in part}
        is_gated = has_gates(named, self.whole)
        return {**{name: tensor for name, tensor in rest.items() if is_gated or name not in gates}, **named}

    def load(self) -> None:
        """Loads the extractor's tensors from the whole network."""
        tensors: Dict[str, Any] = self.whole.state_dict()
        self.extractor.load_state_dict({name: tensors[there] for name, there in self._names().items()})
