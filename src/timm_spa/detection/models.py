"""RetinaNet and Cascade R-CNN on any CNN of timm, with the settings of the paper's table VI.

They take a list of images (3, H, W) with values from 0 to 1, of any sizes, and return what torchvision's detectors
return, except for the labels: these are 0 .. num_classes - 1, in training and in detections. No label stands for the
background. Other labels are an error. (torchvision's Faster R-CNN counts from 1, and 0 is the background.)

    model = retinanet('spa_resnet50', num_classes=12)
    losses = model([image], [dict(boxes=torch.tensor([[10., 20., 60., 90.]]), labels=torch.tensor([3]))])
    detections = model.eval()([image])  # of each image boxes, labels, scores
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
ANCHORS_PER_PLACE = 9  # three octaves by three ratios, torchvision's default for RetinaNet
RPN_SIZES = (32, 64, 128, 256, 512)  # pixels, of the anchors of each level
RATIOS = (0.5, 1., 2.)


class _RetinaNetHead(RetinaNetHead):
    """Gives out float32 under mixed precision: bfloat16 has steps of 4 pixels at 800."""

    def forward(self, x: List[torch.Tensor]) -> Dict[str, torch.Tensor]:
        return {name: value.float() for name, value in super().forward(x).items()}


class _CheckedTargets(nn.Module):
    """Checks what a detector learns from, before torchvision's forward."""
    detector_config: Dict[str, Any]

    def forward(self, images: List[torch.Tensor], targets: Optional[List[Dict[str, torch.Tensor]]] = None) -> Any:
        if len(images) == 0:
            raise DetectionError('A detector needs at least one image, got an empty list.')
        if self.training:
            check_targets(images, targets, self.detector_config['num_classes'])
        return super().forward(images, targets)


class _RetinaNet(_CheckedTargets, RetinaNet):
    pass


class _CascadeRCNN(_CheckedTargets, GeneralizedRCNN):
    pass


class _RPNHead(RPNHead):
    """Gives out float32 under mixed precision, too."""

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

    P6 is made of the last map of the CNN, as in the paper of RetinaNet.

    Args:
        backbone: Name of a model of timm with maps of stride 8, 16 and 32.
        num_classes: Number of classes, without a background: labels are 0 .. num_classes - 1.
        pretrained_backbone: Start from the backbone's published weights, or from a file of weights.
        trainable_layers: Stages of the backbone that are trained, from its end, 0 to 5.
        min_size: Pixels to which the shorter side of an image is resized,
        max_size: unless the longer side would get more than these.
        backbone_kwargs: Further arguments of the backbone, e.g. dict(base='regnety_032') for 'gated'.
        **kwargs: Further arguments of torchvision's RetinaNet.

    Returns:
        The detector, in training mode.

    Raises:
        DetectionError: The backbone does not exist or lacks a map, or an argument is unknown or out of range.
        CheckpointError: The file of weights cannot be read, or does not fit.
    """
    _check_names('retinanet', kwargs, RetinaNet, ('backbone', 'num_classes', 'head', 'kwargs'))  # it ignores others
    config = dict(
        detector='retinanet', backbone=backbone, num_classes=num_classes, trainable_layers=trainable_layers,
        min_size=min_size, max_size=max_size, backbone_kwargs=backbone_kwargs, **kwargs)
    net, mean, std = _backbone(config, pretrained_backbone, RETINANET_STRIDES, p6p7=True)
    head = _RetinaNetHead(net.out_channels, ANCHORS_PER_PLACE, num_classes)
    fields = dict(dict(image_mean=mean, image_std=std, detections_per_img=100), **kwargs)
    return _finished(_RetinaNet(net, num_classes, min_size=min_size, max_size=max_size, head=head, **fields), config)


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
        backbone: Name of a model of timm with maps of stride 4, 8, 16 and 32.
        num_classes: Number of classes, without a background: labels are 0 .. num_classes - 1.
        pretrained_backbone: Start from the backbone's published weights, or from a file of weights.
        trainable_layers: Stages of the backbone that are trained, from its end, 0 to 5.
        min_size: Pixels to which the shorter side of an image is resized,
        max_size: unless the longer side would get more than these.
        backbone_kwargs: Further arguments of the backbone, e.g. dict(base='regnety_032') for 'gated'.
        image_mean: Means of the three colours, from 0 to 1; those that the backbone was trained with if None.
        image_std: Standard deviations, likewise.
        **kwargs: Further arguments of `CascadeRoIHeads`.

    Returns:
        The detector, in training mode.

    Raises:
        DetectionError: The backbone does not exist or lacks a map, or an argument is unknown or out of range.
        CheckpointError: The file of weights cannot be read, or does not fit.
    """
    _check_names('cascade_rcnn', kwargs, CascadeRoIHeads, ('in_channels', 'num_classes', 'strides'))
    config = dict(
        detector='cascade_rcnn', backbone=backbone, num_classes=num_classes, trainable_layers=trainable_layers,
        min_size=min_size, max_size=max_size, backbone_kwargs=backbone_kwargs, **kwargs)
    check_arguments(dict(image_mean=image_mean, image_std=image_std), 'cascade_rcnn')
    net, mean, std = _backbone(config, pretrained_backbone, CASCADE_STRIDES)
    anchors = AnchorGenerator(tuple((size,) for size in RPN_SIZES), (RATIOS,) * len(RPN_SIZES))
    rpn = RegionProposalNetwork(
        anchors, _RPNHead(net.out_channels, len(RATIOS)), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
        batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=dict(training=2000, testing=1000),
        post_nms_top_n=dict(training=2000, testing=1000), nms_thresh=0.7)
    heads = CascadeRoIHeads(net.out_channels, num_classes, CASCADE_STRIDES, **kwargs)
    transform = GeneralizedRCNNTransform(min_size, max_size, image_mean or mean, image_std or std)
    return _finished(_CascadeRCNN(net, rpn, heads, transform), config)


DETECTORS = {'retinanet': retinanet, 'cascade_rcnn': cascade_rcnn}


def create_detector(detector: str, **kwargs: Any) -> Any:
    """Creates a detector by its key in `DETECTORS`, with the arguments of its function."""
    if not isinstance(detector, str) or detector not in DETECTORS:
        raise DetectionError(f'The detector must be one of {", ".join(DETECTORS)}, got {detector!r}.')
    try:
        return DETECTORS[detector](**kwargs)
    except TypeError as e:  # an argument that it does not have
        raise DetectionError(f'{detector} cannot be made of these arguments: {e}') from e


def check_image_size(model: Any, width: int, height: int, of: Union[str, Path]) -> None:
    """Raises a DetectionError, with `of` in front, if an image would lose a whole side where it is resized."""
    smallest, largest = model.transform.min_size[-1], model.transform.max_size
    scale = min(smallest / min(width, height), largest / max(width, height))
    if int(min(width, height) * scale) < 1:
        raise DetectionError(
            f'{of}: {width} x {height} pixels are too narrow for this detector. It resizes the longer side to '
            f'{largest} pixels, which leaves nothing of the shorter one.')


def _check_names(detector: str, kwargs: Dict[str, Any], cls: Type[nn.Module], ours: Sequence[str]) -> None:
    """Raises a DetectionError for arguments that a class does not take, or that its detector sets itself."""
    known = inspect.signature(cls).parameters.keys() - set(ours)
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise DetectionError(
            f'{detector} has no argument {", ".join(unknown)}. Its further arguments are {", ".join(sorted(known))}.')


def _backbone(
        config: Dict[str, Any],
        pretrained: Union[bool, str, Path],
        strides: Tuple[int, ...],
        p6p7: bool = False,
) -> Tuple[Backbone, List[float], List[float]]:
    """Checks a detector's arguments and creates its backbone; returns it with mean and deviation of its images."""
    check_arguments(config, config['detector'])
    config['backbone_kwargs'] = dict(config['backbone_kwargs'] or {})
    channels = config['backbone_kwargs'].get('in_chans', 3)
    if channels != 3:
        raise DetectionError(f'Detectors take images of 3 channels, and in_chans is {channels!r}.')
    body = create_body(config['backbone'], pretrained, **config['backbone_kwargs'])
    mean, std = image_statistics(body, config['backbone'])
    return Backbone(body, strides, config['trainable_layers'], p6p7), mean, std


def _finished(model: Any, config: Dict[str, Any]) -> Any:
    """Notes the arguments that rebuild a detector."""
    transform = model.transform
    model.detector_config = dict(config, image_mean=list(transform.image_mean), image_std=list(transform.image_std))
    model.categories = None  # of a checkpoint: id and name of each class
    return model
