"""A CNN of timm with a feature pyramid, as torchvision's detectors want their backbone."""
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
    """A detector, its data or its training cannot be what was asked for; the message names the thing."""


def create_body(
        name: str,
        pretrained: Union[bool, str, Path],
        out_indices: Optional[Sequence[int]] = None,
        **kwargs: Any,
) -> Any:
    """Creates the feature extractor of a model of timm, with all its maps if `out_indices` is None.

    `pretrained` may be a file of weights of the classification network, whatever `timm_spa.hub.convert` reads, so that
    the file of a plain model starts a model with attention. A detector has no use for the classifier, so the file needs
    none.
    """
    if pretrained not in (True, False):
        from ..hub.convert import convert  # checks every tensor: timm would load what fits and leave the rest random

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
    except Exception as e:  # timm, torch and the Hub each raise their own
        raise DetectionError(f'{name} cannot be the backbone of a detector: {" ".join(str(e).split())}') from e


class Backbone(nn.Module):
    """Maps of a CNN, made a feature pyramid of 256 channels.

    The statistics of the norm layers are frozen: those layers stay in eval mode, and their weights and biases are
    trained. Trainable gates keep updating their statistics, because the gates of a warm start have seen no image yet,
    but not from maps of one cell: see `keep_statistics_of_one_cell`.

    Attributes:
        body: Feature extractor of timm.
        strides: Strides of the maps that it hands to the pyramid.
        out_channels: Channels of every map of the pyramid.
    """

    def __init__(self, body: Any, strides: Sequence[int], trainable_layers: int = 3, p6p7: bool = False):
        """
        Args:
            body: Feature extractor of timm.
            strides: Strides of the maps to use, the finest first; of several maps of one stride the last.
            trainable_layers: Stages that are trained, counted from the end: 5 is everything, 3 all but the stem and
                the first stage, 0 nothing.
            p6p7: Add two maps to the pyramid by convolutions of the last map of the CNN, as RetinaNet, in place of
                one by taking every second place of the last map of the pyramid, as Faster R-CNN.

        Raises:
            DetectionError: A stride is missing, or there is no such number of layers.
        """
        super().__init__()
        info = body.feature_info
        reductions: List[int] = info.reduction()
        missing = [stride for stride in strides if stride not in reductions]
        if missing:
            raise DetectionError(
                f'The backbone has no map of stride {missing[0]}: the strides of its maps are '
                f'{", ".join(map(str, reductions))}, and the detector needs {", ".join(map(str, strides))}. Nets for '
                'small images have none; take one for 224 pixels.')
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
            raise DetectionError(f'trainable_layers is a number from 0 to 5, got {trainable_layers!r}.')
        freeze_stages(body, 5 - trainable_layers)
        keep_statistics_of_one_cell(body)
        self.train()

    def train(self, mode: bool = True) -> 'Backbone':
        """Sets the mode of everything but the norm layers with statistics outside of gates, which stay in eval mode."""
        super().train(mode)
        freeze_statistics(self.body)
        return self

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to maps (N, 256, H / stride, W / stride), the finest first."""
        maps = self.body(x)
        chosen = zip(self.strides, self._indices, strict=True)
        return self.fpn(OrderedDict((str(stride), maps[index]) for stride, index in chosen))


def freeze_statistics(body: nn.Module, only_frozen: bool = False) -> None:
    """Sets norm layers with statistics to eval mode, but for trained ones, those of gates or (`only_frozen`) all."""
    in_gates = set(_norms_of_gates(body))
    for module in filter(_has_statistics, body.modules()):
        is_trained = any(p.requires_grad for p in module.parameters(recurse=False))
        learns = is_trained and (only_frozen or module in in_gates)
        if not learns:
            module.training = False  # not eval(), which reaches the gate in such a layer, and its drop path


def keep_statistics_of_one_cell(body: nn.Module) -> None:
    """Lets norm layers of gates use and keep their running statistics for maps of one cell, in training too.

    Such a map has one value per channel and image: SPA with a pyramid of one cell, gather-excite on small images. A
    batch of one image has no variance then, and that of a few images says little.
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
    """Freezes all that the maps of the first stages, the stem is one, depend on: exact in any architecture."""
    if count == 0:
        return
    limit = 2 ** count
    reductions = body.feature_info.reduction()
    stages = [i for i, reduction in enumerate(reductions) if reduction <= limit]
    if not stages:  # ConvNeXt's first map has stride 4
        return
    parameters = list(body.parameters())
    was_training = body.training
    body.eval()  # batch norm would raise on maps of one value, and update its statistics
    with torch.enable_grad():
        image = torch.rand(1, 3, 64, 64, device=parameters[0].device, dtype=parameters[0].dtype)
        gradients = torch.autograd.grad(body(image)[stages[-1]].sum(), parameters, allow_unused=True)
    body.train(was_training)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.requires_grad_(False)


def image_statistics(body: Any, name: str) -> Tuple[List[float], List[float]]:
    """Returns mean and standard deviation of the pixels, from 0 to 1, that a backbone was trained with."""
    cfg: Any = getattr(body, 'pretrained_cfg', None) or timm.get_pretrained_cfg(name).to_dict()
    return list(cfg['mean']), list(cfg['std'])
