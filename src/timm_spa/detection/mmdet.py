"""Any CNN of timm as a backbone of mmdet, OpenMMLab's detectors.

A config of mmdet imports this module and names the backbone:

    custom_imports = dict(imports='timm_spa.detection.mmdet')
    model = dict(backbone=dict(_delete_=True, type='TimmBackbone', model='spa_resnet50', pretrained=True))
"""
from pathlib import Path
from typing import Any, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .backbone import DetectionError, create_body, freeze_stages, freeze_statistics, keep_statistics_of_one_cell

__all__ = ['PluginError', 'TimmBackbone']


class PluginError(ImportError, DetectionError):
    """A package that the plug-in needs is missing."""


try:
    from mmdet.registry import MODELS
except ImportError as e:
    raise PluginError(
        f'timm_spa.detection.mmdet cannot be imported: it needs mmdet ({e}). Install it: pip install "timm_spa[mmdet]".'
    ) from e
try:
    import mmcv.ops  # noqa: F401  mmdet imports it when it builds a model, and then says less
except ImportError as e:
    raise PluginError(
        f'timm_spa.detection.mmdet cannot be imported: the compiled operators of mmcv cannot be loaded ({e}). Build '
        f'onedl-mmcv for torch {torch.__version__} as in docs/detection.md, "In mmdet".') from e


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
            pretrained: Weights that `init_weights` loads: the published ones, or those of a file, which may be of a
                plain net.
            out_indices: Maps to give out, counted from 0 as in timm: a ResNet has its stem's before those of its four
                stages.
            frozen_stages: Last stage that is not trained, from 1 to 4; 0 freezes the stem only, -1 nothing. Norm
                layers of frozen stages stay in eval mode.
            norm_eval: Keep every norm layer with statistics in eval mode, but for those of gates that are trained.
            **kwargs: Further arguments of the model, e.g. base='regnety_032' for 'gated'.

        Raises:
            DetectionError: There is no such model, map, stage or argument.
        """
        super().__init__()
        if frozen_stages not in range(-1, 5):
            raise DetectionError(f'frozen_stages is a number from -1 to 4, got {frozen_stages!r}.')
        # the maps in front of the last one are needed to find the frozen stages
        self._model = dict(kwargs, name=model, out_indices=tuple(range(max(out_indices) + 1)))
        self.body = create_body(pretrained=False, **self._model)
        self.pretrained = pretrained
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        freeze_stages(self.body, frozen_stages + 1)
        keep_statistics_of_one_cell(self.body)
        self.train()

    def init_weights(self) -> None:
        """Loads the pretrained weights; mmdet calls it before a training only.

        Raises:
            DetectionError: The published weights cannot be had.
            CheckpointError: The file cannot be read, or does not fit.
        """
        if self.pretrained:
            self.body.load_state_dict(create_body(pretrained=self.pretrained, **self._model).state_dict())

    def train(self, mode: bool = True) -> 'TimmBackbone':
        """Sets the mode of everything but the norm layers that stay in eval mode."""
        super().train(mode)
        freeze_statistics(self.body, only_frozen=not self.norm_eval)
        return self

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Maps images (N, 3, H, W) to the maps of `out_indices`."""
        maps = self.body(x)
        return tuple(maps[index] for index in self.out_indices)
