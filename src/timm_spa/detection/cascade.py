"""The three-stage head of Cascade R-CNN (Cai and Vasconcelos, CVPR 2018), with mmdetection's settings.

torchvision has no such head; everything else of the detector is torchvision's.
"""
import math
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_convert, box_iou, clip_boxes_to_image, roi_align

__all__ = ['CascadeHead', 'CascadeRoIHeads', 'decode_boxes', 'encode_boxes', 'pyramid_levels']

Boxes = List[torch.Tensor]  # (R, 4) of each image: left, top, right, bottom, in pixels
Targets = List[Dict[str, torch.Tensor]]

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
LOSS_WEIGHTS = (1., 0.5, 0.25)
DEVIATIONS = tuple(tuple(d / stage for d in (0.1, 0.1, 0.2, 0.2)) for stage in (1, 2, 3))
ROI_SIZE = 7
FINEST_SCALE = 56  # pixels: smaller boxes read the finest map, and each doubling one level up
LARGEST_CHANGE = math.log(1000 / 16)  # of the logarithm of a side, before exp


def encode_boxes(boxes: torch.Tensor, wanted: torch.Tensor, deviations: Sequence[float]) -> torch.Tensor:
    """Describes boxes relative to others: shift of the centre in sides, logarithm of the ratio of sides.

    Args:
        boxes: Boxes (R, 4) to start from.
        wanted: Boxes (R, 4) to describe.
        deviations: Standard deviations of the four numbers, by which they are divided.

    Returns:
        Numbers (R, 4).
    """
    start, end = (box_convert(b, 'xyxy', 'cxcywh') for b in (boxes, wanted))
    shift = (end[:, :2] - start[:, :2]) / start[:, 2:]
    growth = (end[:, 2:] / start[:, 2:]).log()
    return torch.cat([shift, growth], dim=1) / shift.new_tensor(deviations)


def decode_boxes(
        boxes: torch.Tensor,
        deltas: torch.Tensor,
        deviations: Sequence[float],
        image_shape: Tuple[int, int],
) -> torch.Tensor:
    """Moves boxes as numbers of `encode_boxes` say.

    Args:
        boxes: Boxes (R, 4) to start from.
        deltas: Numbers (R, 4).
        deviations: Standard deviations that they were divided by.
        image_shape: Height and width of the image, to which the result is clipped.

    Returns:
        Boxes (R, 4).
    """
    start = box_convert(boxes, 'xyxy', 'cxcywh')
    deltas = deltas * deltas.new_tensor(deviations)
    centre = start[:, :2] + deltas[:, :2] * start[:, 2:]
    sides = start[:, 2:] * deltas[:, 2:].clamp(-LARGEST_CHANGE, LARGEST_CHANGE).exp()
    return clip_boxes_to_image(box_convert(torch.cat([centre, sides], dim=1), 'cxcywh', 'xyxy'), image_shape)


def pyramid_levels(boxes: torch.Tensor, count: int) -> torch.Tensor:
    """Chooses a level of the pyramid for each box by its size (Lin et al., Feature Pyramid Networks, equation 1).

    Args:
        boxes: Boxes (R, 4).
        count: Number of levels.

    Returns:
        Levels (R,), 0 for boxes up to a side of 112 pixels, 1 up to 224, and so on.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    return (sides / FINEST_SCALE + 1e-6).log2().floor().clamp(0, count - 1).long()


class CascadeHead(nn.Module):
    """One stage: two linear layers of 1024, classes and one box for all classes."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 1024):
        """
        Args:
            in_channels: Channels of the pyramid.
            num_classes: Number of classes; the background is one more, the last.
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
        """Maps regions (R, C, 7, 7) to class scores (R, num_classes + 1) before softmax, and numbers (R, 4)."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        # boxes in pixels need more digits than the types of mixed precision have
        return self.classifier(x).float(), self.regressor(x).float()


class CascadeRoIHeads(nn.Module):
    """Three heads, each of which starts from the boxes of the one before, for torchvision's GeneralizedRCNN."""

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
            strides: Strides of the maps to read, which are the names of the maps too.
            score_thresh: Least score of a detection.
            nms_thresh: IoU from which the weaker of two boxes of a class is left out.
            detections_per_img: Largest number of detections of an image.
            batch_size_per_image: Boxes of an image that each stage learns from.
            positive_fraction: Largest part of them that hold an object.
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
        """Finds objects in proposals.

        Args:
            features: Maps (N, C, H / stride, W / stride) by their stride.
            proposals: Boxes of each image.
            image_shapes: Height and width of each image, without padding.
            targets: 'boxes' (T, 4) and 'labels' (T,), 0 .. num_classes - 1, of each image, for training.

        Returns:
            Detections of each image, 'boxes', 'labels' and 'scores', best first; and in training losses by their name.
        """
        if self.training:
            if targets is None:
                raise ValueError('Training needs targets.')
            return [], self._losses(features, proposals, image_shapes, targets)
        scores: List[torch.Tensor] = []
        for head, deviations in zip(self.heads, DEVIATIONS, strict=True):
            logits, deltas = head(self._regions(features, proposals))
            scores.append(logits)
            proposals = _moved(proposals, deltas, deviations, image_shapes)
        # mmdetection averages the scores before softmax
        mean = torch.stack(scores).mean(dim=0).softmax(dim=1)[:, :self.num_classes]
        parts = mean.split([len(boxes) for boxes in proposals])
        return [self._best(boxes, part) for boxes, part in zip(proposals, parts, strict=True)], {}

    def _regions(self, features: Dict[str, torch.Tensor], boxes: Boxes) -> torch.Tensor:
        """Reads each box (R, C, 7, 7) from the map of its size."""
        index = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)
        levels = pyramid_levels(rois[:, 1:], len(self.strides))
        first = features[str(self.strides[0])]
        regions = first.new_zeros(len(rois), first.shape[1], ROI_SIZE, ROI_SIZE)
        for level, stride in enumerate(self.strides):
            chosen = (levels == level).nonzero().flatten()
            found = roi_align(  # in float32 under mixed precision, for the coordinates of the boxes
                features[str(stride)].float(), rois[chosen], ROI_SIZE, 1 / stride, sampling_ratio=0, aligned=True)
            regions = regions.index_copy(0, chosen, found.to(first.dtype))
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
            threshold, weight, deviations = IOU_THRESHOLDS[stage], LOSS_WEIGHTS[stage], DEVIATIONS[stage]
            samples = [
                self._sample(b, t['boxes'], t['labels'], threshold) for b, t in zip(proposals, targets, strict=True)]
            boxes = [sample[0] for sample in samples]
            labels, wanted, given = (torch.cat([sample[i] for sample in samples]) for i in (1, 2, 3))
            logits, deltas = head(self._regions(features, boxes))
            positive = (labels < self.num_classes).nonzero().flatten()
            numbers = encode_boxes(torch.cat(boxes)[positive], wanted[positive], deviations)
            count = max(len(labels), 1)
            losses[f'loss_classifier_{stage}'] = weight * F.cross_entropy(logits, labels, reduction='sum') / count
            losses[f'loss_box_reg_{stage}'] = weight * F.smooth_l1_loss(
                deltas[positive], numbers, reduction='sum') / count
            # the true boxes are added anew in each stage
            parts = given.split([len(b) for b in boxes])
            moved = _moved(boxes, deltas.detach(), deviations, image_shapes)
            proposals = [b[~is_given] for b, is_given in zip(moved, parts, strict=True)]
        return losses

    def _sample(
            self,
            boxes: torch.Tensor,
            true_boxes: torch.Tensor,
            true_labels: torch.Tensor,
            threshold: float,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws boxes to learn from: returns them, their labels, the true box of each, and which are true boxes."""
        true_boxes = true_boxes.to(boxes.dtype)
        boxes = torch.cat([true_boxes, boxes])
        if len(true_boxes):
            overlap, match = box_iou(true_boxes, boxes).max(dim=0)
            holds_object = overlap >= threshold
            labels, wanted = true_labels[match], true_boxes[match]
        else:
            holds_object = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
            labels, wanted = torch.zeros_like(holds_object, dtype=torch.long), boxes
        labels = labels.masked_fill(~holds_object, self.num_classes)
        positive = _drawn(holds_object, self.max_positives)
        negative = _drawn(~holds_object, self.batch_size_per_image - len(positive))
        chosen = torch.cat([positive, negative])
        return boxes[chosen], labels[chosen], wanted[chosen], chosen < len(true_boxes)

    def _best(self, boxes: torch.Tensor, scores: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Returns the detections among boxes (R, 4) with scores (R, num_classes)."""
        index, labels = (scores > self.score_thresh).nonzero().unbind(dim=1)
        boxes, found = boxes[index], scores[index, labels]
        keep = batched_nms(boxes, found, labels, self.nms_thresh)[:self.detections_per_img]
        return dict(boxes=boxes[keep], labels=labels[keep], scores=found[keep])


def _drawn(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the places of up to so many true values, drawn at random."""
    places = mask.nonzero().flatten()
    return places[torch.randperm(len(places), device=places.device)[:count]]


def _moved(
        boxes: Boxes,
        deltas: torch.Tensor,
        deviations: Sequence[float],
        image_shapes: List[Tuple[int, int]],
) -> Boxes:
    parts = deltas.split([len(b) for b in boxes])
    return [decode_boxes(b, d, deviations, s) for b, d, s in zip(boxes, parts, image_shapes, strict=True)]
