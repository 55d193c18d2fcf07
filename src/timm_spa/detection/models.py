"""RetinaNet and Cascade R-CNN on any CNN of timm, with the settings of the paper's table VI.

The detectors take a list of images (3, H, W) of any sizes with values from 0 to 1. They return what torchvision's
detectors return, except for the labels, which are 0 .. num_classes - 1 in training and in detections. The background
has no label, and other labels are an error. (torchvision's Faster R-CNN counts from 1; 0 is its background.)

    model = retinanet('spa_resnet50', num_classes=12)
    losses = model([image], [dict(boxes=torch.tensor([[10., 20., 60., 90.]]), labels=torch.tensor([3]))])
    detections = model.eval()([image])  # for each image: boxes, labels, scores
"""
import inspect
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from .arguments import check_arguments
from .backbone import Backbone, DetectionError, create_body, image_statistics
from .cascade import CascadeRoIHeads
from .targets import check_targets

__all__ = [
    'DETECTORS', 'DetectionError', 'cascade_rcnn', 'check_image_size', 'create_detector', 'retinanet']

RETINANET_STRIDES = (8, 16, 32)
CASCADE_STRIDES = (4, 8, 16, 32)
ANCHORS_PER_CELL = 9  # three scales by three ratios, torchvision's default for RetinaNet
RPN_SIZES = (32, 64, 128, 256, 512)  # side of the anchors of each level, in pixels
RATIOS = (0.5, 1., 2.)


class _RetinaNetHead(RetinaNetHead):
    """Returns float32 under mixed precision, because bfloat16 has a resolution of 4 pixels at 800."""

    def forward(self, x: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {name: value.float() for name, value in super().forward(x).items()}


class _CheckedTargets(nn.Module):
    """Checks the targets before torchvision's forward."""
    detector_config: Dict[str, Any]

    def forward(self, images: List[torch.Tensor], targets: Optional[List[Dict[str, torch.Tensor]]] = None) -> Any:
        if len(images) == 0:
            raise DetectionError(
                'A detector needs at least one image, got an empty list. Give a list of images (3, H, W).')
        if self.training:
            check_targets(images, targets, self.detector_config['num_classes'])
        return super().forward(images, targets)


class _RetinaNet(_CheckedTargets, RetinaNet):
    pass


class _CascadeRCNN(_CheckedTargets, GeneralizedRCNN):
    pass


class _RPNHead(RPNHead):
    """Returns float32 under mixed precision."""

    def forward(self, x: List[torch.Tensor]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        scores, boxes = super().forward(x)
        return [value.float() for value in scores], [value.float() for value in boxes]


def retinanet(
        backbone: str = 'spa_resnet50',
        num_classes: int = 80,
        pretrained_backbone: Union[bool, str, Path] = True,
        trainable_layers: int = 3,
        min_size: int = 800,
        max_size: int = 1333,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> RetinaNet:
    """Creates torchvision's RetinaNet (Lin et al., ICCV 2017) on a CNN of timm.

    P6 is computed from the last feature map of the CNN, as in the RetinaNet paper.

    Args:
        backbone: Name of a model of timm with feature maps of stride 8, 16 and 32.
        num_classes: Number of classes, without a background: labels are 0 .. num_classes - 1.
        pretrained_backbone: True to start from the published weights of the backbone, or a file of weights.
        trainable_layers: Number of trainable stages of the backbone, counted from the end, 0 to 5.
        min_size: Length to which the shorter side of an image is resized, in pixels.
        max_size: Maximum length of the longer side.
        backbone_kwargs: Further arguments of the backbone, e.g. dict(base='regnety_032') for 'gated'.
        **kwargs: Further arguments of torchvision's RetinaNet.

    Returns:
        The detector, in training mode.

    Raises:
        DetectionError: The backbone does not exist or lacks a feature map, or an argument is unknown or out of range.
        CheckpointError: The file of weights cannot be read, or does not fit.
    """
    # torchvision's RetinaNet ignores unknown arguments
    _check_names('retinanet', kwargs, RetinaNet, ('backbone', 'num_classes', 'head', 'kwargs'))
    config = dict(
        detector='retinanet', backbone=backbone, num_classes=num_classes, trainable_layers=trainable_layers,
        min_size=min_size, max_size=max_size, backbone_kwargs=backbone_kwargs, **kwargs)
    pyramid, mean, std = _create_backbone(config, pretrained_backbone, RETINANET_STRIDES, p6p7=True)
    head = _RetinaNetHead(pyramid.out_channels, ANCHORS_PER_CELL, num_classes)
    fields = dict(dict(image_mean=mean, image_std=std, detections_per_img=100), **kwargs)
    model = _RetinaNet(pyramid, num_classes, min_size=min_size, max_size=max_size, head=head, **fields)
    return _with_config(model, config)


def cascade_rcnn(
        backbone: str = 'spa_resnet50',
        num_classes: int = 80,
        pretrained_backbone: Union[bool, str, Path] = True,
        trainable_layers: int = 3,
        min_size: int = 800,
        max_size: int = 1333,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        image_mean: Optional[List[float]] = None,
        image_std: Optional[List[float]] = None,
        **kwargs: Any,
) -> GeneralizedRCNN:
    """Creates Cascade R-CNN (Cai and Vasconcelos, CVPR 2018) on a CNN of timm, from torchvision's parts.

    Args:
        backbone: Name of a model of timm with feature maps of stride 4, 8, 16 and 32.
        num_classes: Number of classes, without a background: labels are 0 .. num_classes - 1.
        pretrained_backbone: True to start from the published weights of the backbone, or a file of weights.
        trainable_layers: Number of trainable stages of the backbone, counted from the end, 0 to 5.
        min_size: Length to which the shorter side of an image is resized, in pixels.
        max_size: Maximum length of the longer side.
        backbone_kwargs: Further arguments of the backbone, e.g. dict(base='regnety_032') for 'gated'.
        image_mean: Mean of the three colours, from 0 to 1. If None, the mean with which the backbone was trained.
        image_std: Standard deviation of the three colours, likewise.
        **kwargs: Further arguments of `CascadeRoIHeads`.

    Returns:
        The detector, in training mode.

    Raises:
        DetectionError: The backbone does not exist or lacks a feature map, or an argument is unknown or out of range.
        CheckpointError: The file of weights cannot be read, or does not fit.
    """
    _check_names('cascade_rcnn', kwargs, CascadeRoIHeads, ('in_channels', 'num_classes', 'strides'))
    config = dict(
        detector='cascade_rcnn', backbone=backbone, num_classes=num_classes, trainable_layers=trainable_layers,
        min_size=min_size, max_size=max_size, backbone_kwargs=backbone_kwargs, **kwargs)
    check_arguments(dict(image_mean=image_mean, image_std=image_std), 'cascade_rcnn')
    pyramid, mean, std = _create_backbone(config, pretrained_backbone, CASCADE_STRIDES)
    anchors = AnchorGenerator(tuple((size,) for size in RPN_SIZES), (RATIOS,) * len(RPN_SIZES))
    rpn = RegionProposalNetwork(
        anchors, _RPNHead(pyramid.out_channels, len(RATIOS)), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
        batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=dict(training=2000, testing=1000),
        post_nms_top_n=dict(training=2000, testing=1000), nms_thresh=0.7)
    heads = CascadeRoIHeads(pyramid.out_channels, num_classes, CASCADE_STRIDES, **kwargs)
    transform = GeneralizedRCNNTransform(min_size, max_size, image_mean or mean, image_std or std)
    return _with_config(_CascadeRCNN(pyramid, rpn, heads, transform), config)


DETECTORS = {'retinanet': retinanet, 'cascade_rcnn': cascade_rcnn}


def create_detector(detector: str, **kwargs: Any) -> Any:
    """Creates a detector by its key in `DETECTORS`, with the arguments of its function."""
    if not isinstance(detector, str) or detector not in DETECTORS:
        raise DetectionError(f'The detector must be one of {", ".join(DETECTORS)}, got {detector!r}.')
    try:
        return DETECTORS[detector](**kwargs)
    except TypeError as e:  # an unknown or missing argument
        raise DetectionError(f'{detector} cannot be created with these arguments: {e}') from e


def check_image_size(model: Any, width: int, height: int, source: Union[str, Path]) -> None:
    """Raises a DetectionError if resizing would reduce one side of an image to 0.

    Args:
        model: Detector.
        width: Width of the image.
        height: Height of the image.
        source: Image file, for the error message.
    """
    smallest, largest = model.transform.min_size[-1], model.transform.max_size
    scale = min(smallest / min(width, height), largest / max(width, height))
    if int(min(width, height) * scale) < 1:
        raise DetectionError(
            f'{source}: {width} x {height} pixels are too narrow for this detector, which resizes the longer side to '
            f'{largest} pixels and the shorter side to 0. Crop the image, or train with a larger max_size.')


def _check_names(detector: str, kwargs: Dict[str, Any], cls: Type[nn.Module], ours: Sequence[str]) -> None:
    """Raises a DetectionError for arguments that a class does not take, or that the detector sets itself."""
    known = inspect.signature(cls).parameters.keys() - set(ours)
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise DetectionError(
            f'{detector}: unknown argument {", ".join(unknown)}. Further arguments are {", ".join(sorted(known))}.')


def _create_backbone(
        config: Dict[str, Any],
        pretrained: Union[bool, str, Path],
        strides: Tuple[int, ...],
        p6p7: bool = False,
) -> Tuple[Backbone, List[float], List[float]]:
    """Checks the arguments of a detector, and returns its backbone with the mean and standard deviation of images."""
    check_arguments(config, config['detector'])
    config['backbone_kwargs'] = dict(config['backbone_kwargs'] or {})
    channels = config['backbone_kwargs'].get('in_chans', 3)
    if channels != 3:
        raise DetectionError(f'Detectors need in_chans=3, got {channels!r}. Convert the images to RGB.')
    body = create_body(config['backbone'], pretrained, **config['backbone_kwargs'])
    mean, std = image_statistics(body, config['backbone'])
    return Backbone(body, strides, config['trainable_layers'], p6p7), mean, std


def _with_config(model: Any, config: Dict[str, Any]) -> Any:
    """Adds the arguments that rebuild a detector, and returns the detector."""
    transform = model.transform
    model.detector_config = dict(config, image_mean=list(transform.image_mean), image_std=list(transform.image_std))
    model.categories = None  # `load_detector` sets id and name of each class
    return model
