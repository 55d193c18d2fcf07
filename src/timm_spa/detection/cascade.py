"""The three-stage head of Cascade R-CNN (Cai and Vasconcelos, CVPR 2018), with mmdetection's settings.

torchvision does not provide this head. All other parts of the detector are torchvision's.
"""
import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_convert, box_iou, clip_boxes_to_image, roi_align

__all__ = ['CascadeHead', 'CascadeRoIHeads', 'decode_boxes', 'encode_boxes', 'pyramid_levels']

Boxes = List[torch.Tensor]  # for each image (R, 4): left, top, right, bottom in pixels
Targets = List[Dict[str, torch.Tensor]]

# for each stage
IOU_THRESHOLDS = (0.5, 0.6, 0.7)
LOSS_WEIGHTS = (1., 0.5, 0.25)
DELTA_STDS = tuple(tuple(std / stage for std in (0.1, 0.1, 0.2, 0.2)) for stage in (1, 2, 3))
ROI_SIZE = 7
FINEST_SCALE = 56  # pixels: boxes of up to twice this side read the finest feature map
MAX_LOG_SCALE = math.log(1000 / 16)  # limit for the logarithm of the ratio of sides


def encode_boxes(boxes: torch.Tensor, targets: torch.Tensor, stds: Sequence[float]) -> torch.Tensor:
    """Encodes boxes relative to others: shift of the centre in units of the sides, logarithm of the ratio of sides.

    Args:
        boxes: Boxes (R, 4) to start from.
        targets: Boxes (R, 4) to encode.
        stds: Standard deviations of the four deltas, by which the deltas are divided.

    Returns:
        Deltas (R, 4).
    """
    start, end = (box_convert(b, 'xyxy', 'cxcywh') for b in (boxes, targets))
    shift = (end[:, :2] - start[:, :2]) / start[:, 2:]
    log_scale = (end[:, 2:] / start[:, 2:]).log()
    return torch.cat([shift, log_scale], dim=1) / shift.new_tensor(stds)


def decode_boxes(
        boxes: torch.Tensor,
        deltas: torch.Tensor,
        stds: Sequence[float],
        image_shape: Tuple[int, int],
) -> torch.Tensor:
    """Applies the deltas of `encode_boxes` to boxes.

    Args:
        boxes: Boxes (R, 4) to start from.
        deltas: Deltas (R, 4).
        stds: Standard deviations of the four deltas.
        image_shape: Height and width of the image, to which the result is clipped.

    Returns:
        Boxes (R, 4).
    """
    start = box_convert(boxes, 'xyxy', 'cxcywh')
    deltas = deltas * deltas.new_tensor(stds)
    centre = start[:, :2] + deltas[:, :2] * start[:, 2:]
    sides = start[:, 2:] * deltas[:, 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return clip_boxes_to_image(box_convert(torch.cat([centre, sides], dim=1), 'cxcywh', 'xyxy'), image_shape)


def pyramid_levels(boxes: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the pyramid level of each box by its size (Lin et al., Feature Pyramid Networks, equation 1).

    Args:
        boxes: Boxes (R, 4).
        count: Number of levels.

    Returns:
        Levels (R,): 0 for boxes with sides of up to 112 pixels, 1 up to 224, and so on.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    return (sides / FINEST_SCALE + 1e-6).log2().floor().clamp(0, count - 1).long()


class CascadeHead(nn.Module):
    """Head of one stage: two linear layers of 1024 channels, class scores, and one box for all classes."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 1024):
        """
        Args:
            in_channels: Channels of the pyramid.
            num_classes: Number of classes. The background is one more class, the last.
            width: Channels of the linear layers.
        """
        super().__init__()
        self.fc1 = nn.Linear(in_channels * ROI_SIZE ** 2, width)
        self.fc2 = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_classes + 1)
        self.regressor = nn.Linear(width, 4)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.normal_(self.regressor.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.classifier, self.regressor):
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Maps regions (R, C, 7, 7) to logits (R, num_classes + 1) and deltas (R, 4)."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        # box coordinates in pixels need float32, also under mixed precision
        return self.classifier(x).float(), self.regressor(x).float()


class _Sample(NamedTuple):
    """Boxes of one image that a stage learns from.

    Attributes:
        boxes: Boxes (S, 4).
        labels: Labels (S,), `num_classes` for the background.
        targets: Boxes (S, 4) to predict; of no meaning for the background.
        is_true: Which boxes (S,) are true boxes.
    """
    boxes: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    is_true: torch.Tensor


class CascadeRoIHeads(nn.Module):
    """Three heads for torchvision's GeneralizedRCNN. Each head refines the boxes of the previous one."""

    def __init__(
            self,
            in_channels: int,
            num_classes: int,
            strides: Sequence[int] = (4, 8, 16, 32),
            score_thresh: float = 0.05,
            nms_thresh: float = 0.5,
            detections_per_img: int = 100,
            batch_size_per_image: int = 512,
            positive_fraction: float = 0.25,
    ):
        """
        Args:
            in_channels: Channels of the pyramid.
            num_classes: Number of classes, without a background.
            strides: Strides of the feature maps to read, which are also the keys of the feature maps.
            score_thresh: Score that a detection must exceed.
            nms_thresh: IoU above which the lower-scoring of two boxes of a class is dropped.
            detections_per_img: Maximum number of detections per image.
            batch_size_per_image: Boxes per image that each stage learns from.
            positive_fraction: Maximum fraction of these boxes that contain an object.
        """
        super().__init__()
        self.heads = nn.ModuleList([CascadeHead(in_channels, num_classes) for _ in IOU_THRESHOLDS])
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.batch_size_per_image = batch_size_per_image
        self.max_positives = int(batch_size_per_image * positive_fraction)

    def forward(
            self,
            features: Dict[str, torch.Tensor],
            proposals: Boxes,
            image_shapes: List[Tuple[int, int]],
            targets: Optional[Targets] = None,
    ) -> Tuple[List[Dict[str, torch.Tensor]], Dict[str, torch.Tensor]]:
        """Detects objects in proposals.

        Args:
            features: Feature maps (N, C, H / stride, W / stride) by their stride.
            proposals: Boxes of each image.
            image_shapes: Height and width of each image, without padding.
            targets: For training, 'boxes' (T, 4) and 'labels' (T,), 0 .. num_classes - 1, of each image.

        Returns:
            In eval mode, 'boxes', 'labels' and 'scores' of each image, highest score first. In training mode, losses.
        """
        if self.training:
            if targets is None:
                raise ValueError('Training needs targets.')
            return [], self._losses(features, proposals, image_shapes, targets)
        scores: List[torch.Tensor] = []
        for head, stds in zip(self.heads, DELTA_STDS, strict=True):
            logits, deltas = head(self._regions(features, proposals))
            scores.append(logits)
            proposals = _decode_all(proposals, deltas, stds, image_shapes)
        # mmdetection averages the logits before softmax
        mean = torch.stack(scores).mean(dim=0).softmax(dim=1)[:, :self.num_classes]
        parts = mean.split([len(boxes) for boxes in proposals])
        return [self._best(boxes, part) for boxes, part in zip(proposals, parts, strict=True)], {}

    def _regions(self, features: Dict[str, torch.Tensor], boxes: Boxes) -> torch.Tensor:
        """Returns the features (R, C, 7, 7) inside each box, from the pyramid level for its size."""
        index = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)
        levels = pyramid_levels(rois[:, 1:], len(self.strides))
        first = features[str(self.strides[0])]
        regions = first.new_zeros(len(rois), first.shape[1], ROI_SIZE, ROI_SIZE)
        for level, stride in enumerate(self.strides):
            chosen = (levels == level).nonzero().flatten()
            aligned = roi_align(  # in float32 under mixed precision, because of the box coordinates
                features[str(stride)].float(), rois[chosen], ROI_SIZE, 1 / stride, sampling_ratio=0, aligned=True)
            regions = regions.index_copy(0, chosen, aligned.to(first.dtype))
        return regions

    def _losses(
            self,
            features: Dict[str, torch.Tensor],
            proposals: Boxes,
            image_shapes: List[Tuple[int, int]],
            targets: Targets,
    ) -> Dict[str, torch.Tensor]:
        losses = {}
        for stage, head in enumerate(self.heads):
            weight, stds = LOSS_WEIGHTS[stage], DELTA_STDS[stage]
            samples = [
                self._sample(b, t['boxes'], t['labels'], IOU_THRESHOLDS[stage])
                for b, t in zip(proposals, targets, strict=True)]
            boxes = [sample.boxes for sample in samples]
            labels = torch.cat([sample.labels for sample in samples])
            target_boxes = torch.cat([sample.targets for sample in samples])
            logits, deltas = head(self._regions(features, boxes))
            positive = (labels < self.num_classes).nonzero().flatten()
            target_deltas = encode_boxes(torch.cat(boxes)[positive], target_boxes[positive], stds)
            count = max(len(labels), 1)
            losses[f'loss_classifier_{stage}'] = weight * F.cross_entropy(logits, labels, reduction='sum') / count
            losses[f'loss_box_reg_{stage}'] = weight * F.smooth_l1_loss(
                deltas[positive], target_deltas, reduction='sum') / count
            # the next stage adds the true boxes again
            refined = _decode_all(boxes, deltas.detach(), stds, image_shapes)
            proposals = [b[~sample.is_true] for b, sample in zip(refined, samples, strict=True)]
        return losses

    def _sample(
            self,
            boxes: torch.Tensor,
            true_boxes: torch.Tensor,
            true_labels: torch.Tensor,
            threshold: float,
    ) -> _Sample:
        """Draws boxes to learn from, among the proposals and the true boxes of an image."""
        true_boxes = true_boxes.to(boxes.dtype)
        boxes = torch.cat([true_boxes, boxes])
        if len(true_boxes):
            iou, match = box_iou(true_boxes, boxes).max(dim=0)
            is_object = iou >= threshold
            labels, targets = true_labels[match], true_boxes[match]
        else:
            is_object = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
            labels, targets = torch.zeros_like(is_object, dtype=torch.long), boxes
        labels = labels.masked_fill(~is_object, self.num_classes)
        positive = _draw(is_object, self.max_positives)
        negative = _draw(~is_object, self.batch_size_per_image - len(positive))
        chosen = torch.cat([positive, negative])
        return _Sample(boxes[chosen], labels[chosen], targets[chosen], chosen < len(true_boxes))

    def _best(self, boxes: torch.Tensor, scores: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Returns the detections among boxes (R, 4) with scores (R, num_classes)."""
        index, labels = (scores > self.score_thresh).nonzero().unbind(dim=1)
        boxes, scores = boxes[index], scores[index, labels]
        keep = batched_nms(boxes, scores, labels, self.nms_thresh)[:self.detections_per_img]
        return dict(boxes=boxes[keep], labels=labels[keep], scores=scores[keep])


def _draw(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices of up to `count` true values, drawn at random."""
    indices = mask.nonzero().flatten()
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]


def _decode_all(
        boxes: Boxes,
        deltas: torch.Tensor,
        stds: Sequence[float],
        image_shapes: List[Tuple[int, int]],
) -> Boxes:
    """Applies deltas (R, 4) to the boxes of all images."""
    parts = deltas.split([len(b) for b in boxes])
    return [decode_boxes(b, d, stds, s) for b, d, s in zip(boxes, parts, image_shapes, strict=True)]
