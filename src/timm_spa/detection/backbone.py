"""A CNN of timm with a feature pyramid, as a backbone for torchvision's detectors."""
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
import torch.nn as nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .._errors import TimmSpaError
from .._names import check_model_name

__all__ = ['Backbone', 'DetectionError', 'create_body']

PYRAMID_CHANNELS = 256


class DetectionError(TimmSpaError, ValueError):
    """Base class for errors in detectors, their datasets and their training."""


def create_body(
        name: str,
        pretrained: Union[bool, str, Path],
        out_indices: Optional[Sequence[int]] = None,
        **kwargs: Any,
) -> Any:
    """Creates a feature extractor from a model of timm.

    Args:
        name: Name of the model.
        pretrained: True for the published weights, or a file of classification weights that `timm_spa.hub.convert`
            reads, e.g. the weights of the plain model for a model with attention. The file needs no classifier.
        out_indices: Feature maps to return; all if None.
        **kwargs: Further arguments of the model.

    Raises:
        DetectionError: The model does not exist, or cannot be created.
        CheckpointError: The file cannot be read, or does not fit.
    """
    if pretrained not in (True, False):
        from ..hub.convert import convert  # checks every tensor; timm would leave unmatched tensors random

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'model.safetensors'
            convert(str(pretrained), file, name, with_classifier=False, **kwargs)
            overlay = dict(file=str(file), source='')
            return create_body(name, True, out_indices, **dict(kwargs, pretrained_cfg_overlay=overlay))
    check_model_name(name, DetectionError)
    try:
        return timm.create_model(
            name, pretrained=bool(pretrained), features_only=True, out_indices=out_indices, **kwargs)
    except TimmSpaError:
        raise
    except Exception as e:  # timm, torch and the Hub raise different exceptions
        raise DetectionError(f'{name} cannot be the backbone of a detector: {" ".join(str(e).split())}') from e


class Backbone(nn.Module):
    """A CNN with a feature pyramid of 256 channels.

    Norm layers with running statistics stay in eval mode, but their weights and biases are trained. Trainable gates
    keep updating their statistics, because the gates of a warm start have not seen any image yet. Feature maps of one
    cell are an exception, see `freeze_statistics_for_one_cell`.

    Attributes:
        body: Feature extractor of timm.
        strides: Strides of the feature maps from which the pyramid is built.
        out_channels: Channels of each feature map of the pyramid.
    """

    def __init__(self, body: Any, strides: Sequence[int], trainable_layers: int = 3, p6p7: bool = False):
        """
        Args:
            body: Feature extractor of timm.
            strides: Strides of the feature maps to use, in increasing order. If several feature maps have the same
                stride, the last one is used.
            trainable_layers: Number of trainable stages, counted from the end. 5 trains everything, 3 freezes the stem
                and the first stage, 0 freezes everything.
            p6p7: Add two levels to the pyramid, computed by convolutions from the last feature map of the CNN, as in
                RetinaNet. Otherwise one level is added by subsampling the last level, as in Faster R-CNN.

        Raises:
            DetectionError: A stride is missing, or `trainable_layers` is out of range.
        """
        super().__init__()
        info = body.feature_info
        reductions: List[int] = info.reduction()
        missing = [stride for stride in strides if stride not in reductions]
        if missing:
            raise DetectionError(
                f'The backbone lacks a feature map of stride {missing[0]}: its strides are '
                f'{", ".join(map(str, reductions))}, but the detector needs {", ".join(map(str, strides))}. Use a '
                'model for images of 224 pixels; models for small images lack these strides.')
        last = {stride: index for index, stride in enumerate(reductions)}
        self.body = body
        self.strides = tuple(strides)
        self._indices = [last[stride] for stride in strides]
        channels = [info.channels()[i] for i in self._indices]
        extra = LastLevelP6P7(channels[-1], PYRAMID_CHANNELS) if p6p7 else LastLevelMaxPool()
        if isinstance(extra, LastLevelP6P7):
            extra.use_P5 = False  # otherwise torchvision computes P6 from P5 where C5 has 256 channels
        self.fpn = FeaturePyramidNetwork(channels, PYRAMID_CHANNELS, extra)
        self.out_channels = PYRAMID_CHANNELS
        if trainable_layers not in range(6):
            raise DetectionError(f'trainable_layers must be a whole number from 0 to 5, got {trainable_layers!r}.')
        freeze_stages(body, 5 - trainable_layers)
        freeze_statistics_for_one_cell(body)
        self.train()

    def train(self, mode: bool = True) -> 'Backbone':
        """Sets the mode of all layers, except for norm layers that stay in eval mode."""
        super().train(mode)
        freeze_statistics(self.body)
        return self

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to pyramid levels (N, 256, H / stride, W / stride), the finest first."""
        feature_maps = self.body(x)
        chosen = zip(self.strides, self._indices, strict=True)
        return self.fpn(OrderedDict((str(stride), feature_maps[index]) for stride, index in chosen))


def freeze_statistics(body: nn.Module, only_frozen: bool = False) -> None:
    """Sets norm layers with running statistics to eval mode, except for trainable norm layers of gates.

    Args:
        body: Feature extractor.
        only_frozen: Also except all other trainable norm layers.
    """
    norms_of_gates = set(_norms_of_gates(body))
    for module in filter(_has_statistics, body.modules()):
        is_trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        updates = is_trainable and (only_frozen or module in norms_of_gates)
        if not updates:
            module.training = False  # eval() would also change a gate or drop path inside the norm layer


def freeze_statistics_for_one_cell(body: nn.Module) -> None:
    """Makes norm layers of gates use their running statistics, unchanged, for feature maps of one cell.

    A feature map of one cell has one value per channel and image, e.g. for SPA with a pyramid of one cell or for
    gather-excite on small images. The variance of one value is undefined, and the variance over the few images of a
    batch is a poor estimate.
    """
    for module in _norms_of_gates(body):
        module.register_forward_pre_hook(_freeze_for_one_cell)
        module.register_forward_hook(_restore_mode, always_call=True)


def _norms_of_gates(body: nn.Module) -> Iterator[nn.Module]:
    gates = [m for m in body.modules() if hasattr(m, 'gate_name')]
    return (m for gate in gates for m in gate.modules() if _has_statistics(m))


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, 'running_mean', None), torch.Tensor)


def _freeze_for_one_cell(module: Any, inputs: Tuple[torch.Tensor]) -> None:
    module.mode_to_restore = module.training
    if inputs[0].shape[2:].numel() == 1:
        module.training = False


def _restore_mode(module: Any, inputs: Any, output: Any) -> None:
    module.training = module.mode_to_restore


def freeze_stages(body: Any, count: int) -> None:
    """Freezes the first stages, of which the stem is one.

    Gradients show which parameters the feature maps of these stages depend on, so this works for any architecture.
    """
    if count == 0:
        return
    limit = 2 ** count
    reductions = body.feature_info.reduction()
    stages = [i for i, reduction in enumerate(reductions) if reduction <= limit]
    if not stages:  # the first feature map of ConvNeXt has stride 4
        return
    parameters = list(body.parameters())
    was_training = body.training
    body.eval()  # in training mode, batch norm raises for single values and updates its statistics
    with torch.enable_grad():
        image = torch.rand(1, 3, 64, 64, device=parameters[0].device, dtype=parameters[0].dtype)
        gradients = torch.autograd.grad(body(image)[stages[-1]].sum(), parameters, allow_unused=True)
    body.train(was_training)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.requires_grad_(False)


def image_statistics(body: Any, name: str) -> Tuple[List[float], List[float]]:
    """Returns the mean and standard deviation by which the images were normalized when a backbone was trained."""
    cfg: Any = getattr(body, 'pretrained_cfg', None) or timm.get_pretrained_cfg(name).to_dict()
    return list(cfg['mean']), list(cfg['std'])
