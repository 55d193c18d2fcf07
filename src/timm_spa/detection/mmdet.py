"""Any CNN of timm as a backbone of mmdet, OpenMMLab's detectors.

A config of mmdet imports this module and names the backbone:

    custom_imports = dict(imports='timm_spa.detection.mmdet')
    model = dict(backbone=dict(_delete_=True, type='TimmBackbone', model='spa_resnet50', pretrained=True))
"""
from pathlib import Path
from typing import Any, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .backbone import DetectionError, create_body, freeze_stages, freeze_statistics, freeze_statistics_for_one_cell

__all__ = ['PluginError', 'TimmBackbone']


class PluginError(ImportError, DetectionError):
    """A package that this module needs is missing."""


def _import_registry() -> Any:
    """Returns mmdet's registry of models. Raises a PluginError if mmdet or mmcv's operators are missing."""
    try:
        from mmdet.registry import MODELS
    except ImportError as e:
        raise PluginError(
            f'{__name__} cannot be imported: it needs mmdet ({e}). Install it: pip install "timm_spa[mmdet]".') from e
    try:
        # mmdet imports the operators later, when it builds a model, with a message that does not name the cause
        import mmcv.ops  # noqa: F401
    except ImportError as e:
        raise PluginError(
            f'{__name__} cannot be imported: the compiled operators of mmcv cannot be loaded ({e}). Build onedl-mmcv '
            f'for torch {torch.__version__} as described in docs/detection.md, "In mmdet".') from e
    return MODELS


MODELS = _import_registry()


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """A CNN of timm, with the arguments of mmdet's ResNet."""

    def __init__(
            self,
            model: str,
            pretrained: Union[bool, str, Path] = False,
            out_indices: Sequence[int] = (1, 2, 3, 4),
            frozen_stages: int = -1,
            norm_eval: bool = True,
            **kwargs: Any,
    ):
        """
        Args:
            model: Name of a model of timm, e.g. 'spa_resnet50', 'resnet50.a1_in1k' or 'gated'.
            pretrained: Weights that `init_weights` loads: True for the published ones, or a file, which may contain
                the weights of the plain model.
            out_indices: Feature maps to return, counted from 0 as in timm. A ResNet has one for the stem and one for
                each of its four stages.
            frozen_stages: Last frozen stage, from 1 to 4. 0 freezes only the stem, -1 nothing. Norm layers of frozen
                stages stay in eval mode.
            norm_eval: Keep norm layers with statistics in eval mode, except for those of trainable gates.
            **kwargs: Further arguments of the model, e.g. base='regnety_032' for 'gated'.

        Raises:
            DetectionError: The model, a feature map, the stage or an argument does not exist.
        """
        super().__init__()
        if frozen_stages not in range(-1, 5):
            raise DetectionError(f'frozen_stages must be a whole number from -1 to 4, got {frozen_stages!r}.')
        # freeze_stages needs all feature maps up to the last one
        self._body_kwargs = dict(kwargs, name=model, out_indices=tuple(range(max(out_indices) + 1)))
        self.body = create_body(pretrained=False, **self._body_kwargs)
        self.pretrained = pretrained
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        freeze_stages(self.body, frozen_stages + 1)
        freeze_statistics_for_one_cell(self.body)
        self.train()

    def init_weights(self) -> None:
        """Loads the pretrained weights. mmdet calls this method only before a training.

        Raises:
            DetectionError: The published weights cannot be loaded.
            CheckpointError: The file cannot be read, or does not fit.
        """
        if self.pretrained:
            pretrained_body = create_body(pretrained=self.pretrained, **self._body_kwargs)
            self.body.load_state_dict(pretrained_body.state_dict())

    def train(self, mode: bool = True) -> 'TimmBackbone':
        """Sets the mode of all layers, except for norm layers that stay in eval mode."""
        super().train(mode)
        freeze_statistics(self.body, only_frozen=not self.norm_eval)
        return self

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Maps images (N, 3, H, W) to the feature maps of `out_indices`."""
        feature_maps = self.body(x)
        return tuple(feature_maps[index] for index in self.out_indices)
