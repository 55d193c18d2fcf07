"""The head of Cascade R-CNN against results computed by hand."""
import math

import pytest
import torch
from test_detection import target
from torchvision.ops import box_iou

from timm_spa.detection.cascade import DELTA_STDS, CascadeRoIHeads, decode_boxes, encode_boxes, pyramid_levels


def test_encoding_by_hand():
    boxes, targets = torch.tensor([[0., 0, 10, 20]]), torch.tensor([[5., 10, 25, 20]])
    # centres (5, 10) and (15, 15), sides (10, 20) and (20, 10)
    expected = torch.tensor([[1 / 0.1, 0.25 / 0.1, math.log(2) / 0.2, -math.log(2) / 0.2]])
    torch.testing.assert_close(encode_boxes(boxes, targets, DELTA_STDS[0]), expected)
    torch.testing.assert_close(encode_boxes(boxes, targets, DELTA_STDS[1]), 2 * expected)
    torch.testing.assert_close(encode_boxes(boxes, targets, DELTA_STDS[2]), 3 * expected)


def test_decoding_undoes_encoding():
    generator = torch.Generator().manual_seed(0)
    boxes, targets = torch.rand(2, 50, 4, generator=generator) * 50
    for b in (boxes, targets):
        b[:, 2:] += b[:, :2] + 1
    for stds in DELTA_STDS:
        deltas = encode_boxes(boxes, targets, stds)
        torch.testing.assert_close(decode_boxes(boxes, deltas, stds, (200, 200)), targets, rtol=1e-4, atol=1e-3)
    clipped = decode_boxes(boxes, torch.full((50, 4), 1e4), DELTA_STDS[0], (30, 40))
    assert clipped.isfinite().all()
    assert clipped[:, 2].max() <= 40
    assert clipped[:, 3].max() <= 30


def test_levels_by_hand():
    sides = torch.tensor([1., 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    assert pyramid_levels(boxes, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pyramid_levels(torch.tensor([[0., 0, 56, 224], [5, 5, 5, 5]]), 4).tolist() == [1, 0], 'by area'


def ramps(height, width):
    """Returns feature maps whose values are the x coordinates of their cell centres, in pixels of the image."""
    return {
        str(s): ((torch.arange(width // s) + 0.5) * s).expand(2, 1, height // s, width // s) for s in (4, 8, 16, 32)}


def test_regions_are_read_inside_the_boxes():
    heads = CascadeRoIHeads(1, 2)
    boxes = [torch.tensor([[40., 40, 96, 96], [32, 32, 256, 256]]), torch.tensor([[100., 32, 240, 172]])]
    regions = heads._regions(ramps(320, 320), boxes)
    assert regions.shape == (3, 1, 7, 7)
    for region, box in zip(regions, torch.cat(boxes), strict=True):
        centres = box[0] + (torch.arange(7) + 0.5) * (box[2] - box[0]) / 7
        torch.testing.assert_close(region[0], centres.expand(7, 7))


@pytest.mark.parametrize(('threshold', 'objects'), [(0.5, 3), (0.6, 2), (0.7, 2)])
def test_sampling_by_overlap(threshold, objects):
    heads = CascadeRoIHeads(1, 5)
    true_boxes, labels = torch.tensor([[0., 0, 100, 100]]), torch.tensor([4])
    # overlaps 0.8, 0.55 and 0.2
    boxes = torch.tensor([[0., 0, 100, 80], [0, 0, 100, 55], [0, 0, 100, 20]])
    drawn, drawn_labels, targets, is_true = heads._sample(boxes, true_boxes, labels, threshold)
    assert len(drawn) == 4
    assert (drawn_labels == 4).sum() == objects
    assert (drawn_labels == 5).sum() == 4 - objects
    assert torch.equal((drawn_labels == 4), box_iou(drawn, true_boxes)[:, 0] >= threshold)
    assert torch.equal(targets, true_boxes.expand(4, 4))
    assert torch.equal(drawn[is_true], true_boxes)


def test_an_iou_equal_to_the_threshold_is_an_object():
    true_boxes, boxes = torch.tensor([[0., 0, 100, 100]]), torch.tensor([[0., 0, 100, 50]])
    _, labels, _, _ = CascadeRoIHeads(1, 5)._sample(boxes, true_boxes, torch.tensor([4]), 0.5)
    assert labels.tolist() == [4, 4]


def test_sampling_is_limited():
    heads = CascadeRoIHeads(1, 5)
    true_boxes = torch.tensor([[0., 0, 100, 100]])
    near, far = torch.tensor([0., 0, 100, 90]).expand(1000, 4), torch.tensor([0., 0, 100, 9]).expand(1000, 4)
    _, labels, _, _ = heads._sample(torch.cat([near, far]), true_boxes, torch.tensor([2]), 0.5)
    assert [(labels == 2).sum(), (labels == 5).sum()] == [128, 384]
    _, labels, _, is_true = heads._sample(far, true_boxes[:0], torch.tensor([], dtype=torch.long), 0.5)
    assert labels.tolist() == [5] * 512
    assert not is_true.any()


def stubbed(*outputs):
    """Returns cascade heads with fixed logits and deltas for each stage, and a list of the boxes of each stage."""
    heads = CascadeRoIHeads(1, 2)
    boxes_of_stages = []
    heads._regions = lambda features, boxes: boxes_of_stages.append(boxes) or boxes
    for head, (scores, deltas) in zip(heads.heads, outputs, strict=True):
        head.forward = lambda boxes, s=scores, d=deltas: (
            torch.tensor(s).expand(sum(map(len, boxes)), -1), torch.tensor(d).expand(sum(map(len, boxes)), -1))
    return heads, boxes_of_stages


def test_each_stage_starts_from_the_boxes_of_the_previous_stage():
    """Each stage moves the box by a tenth of its side. The logits of all stages are averaged."""
    heads, boxes_of_stages = stubbed(
        ([2., 0, 0], [1., 0, 0, 0]), ([0., 4, 0], [2., 0, 0, 0]), ([1., 2, 3], [3., 0, 0, 0]))
    (detection,), losses = heads.eval()({}, [torch.tensor([[0., 0, 10, 10]])], [(100, 100)])
    assert losses == {}
    assert [boxes[0][0].tolist() for boxes in boxes_of_stages] == [
        pytest.approx([x, 0, x + 10, 10]) for x in (0, 1, 2)]
    expected = torch.tensor([1., 2, 1]).softmax(0)  # the mean of the three
    assert detection['labels'].tolist() == [1, 0]
    torch.testing.assert_close(detection['scores'], expected[[1, 0]])
    torch.testing.assert_close(detection['boxes'], torch.tensor([[3., 0, 13, 10]]).expand(2, 4))


def test_weak_and_duplicate_detections_are_dropped():
    heads = CascadeRoIHeads(1, 2, detections_per_img=2)
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [80, 80, 90, 90]])
    scores = torch.tensor([[0.5, 0.04], [0.9, 0.3], [0.2, 0.01], [0.1, 0]])
    detection = heads._best(boxes, scores)
    assert detection['scores'].tolist() == pytest.approx([0.9, 0.3]), 'the best two; 0.5 overlaps 0.9 of its class'
    assert detection['labels'].tolist() == [0, 1]


def test_detections_need_a_score_above_the_threshold():
    detection = CascadeRoIHeads(1, 2)._best(torch.tensor([[0., 0, 10, 10]]), torch.tensor([[0.051, 0.049]]))
    assert detection['labels'].tolist() == [0]


def test_losses_by_hand():
    even = [0., 0, 0]
    heads, boxes_of_stages = stubbed(*[(even, [0., 0, 0, 0])] * 3)
    proposals = [torch.tensor([[0., 0, 100, 80]])]  # IoU 0.8: an object in each stage
    targets = [target([[0., 0, 100, 100]], [1])]
    _, losses = heads({}, proposals, [(200, 200)], targets)
    assert all(len(boxes[0]) == 2 for boxes in boxes_of_stages), 'the proposal and the true box, added in each stage'
    for stage, weight in enumerate((1, 0.5, 0.25)):
        assert losses[f'loss_classifier_{stage}'].item() == pytest.approx(weight * math.log(3))
        deltas = [(stage + 1) * v for v in (10 / 80 / 0.1, math.log(100 / 80) / 0.2)]
        smooth = sum(v - 0.5 if v > 1 else v * v / 2 for v in deltas)
        assert losses[f'loss_box_reg_{stage}'].item() == pytest.approx(weight * smooth / 2), 'averaged over two boxes'


def test_no_gradient_flows_through_the_boxes_of_a_stage():
    heads, boxes_of_stages = stubbed(*[([0., 0, 0], [0., 0, 0, 0])] * 3)
    for head in heads.heads:
        head.forward = lambda boxes: (
            torch.zeros(sum(map(len, boxes)), 3), torch.zeros(sum(map(len, boxes)), 4, requires_grad=True))
    heads({}, [torch.tensor([[0., 0, 100, 80]])], [(200, 200)], [target([[0., 0, 100, 100]], [1])])
    assert [boxes[0].requires_grad for boxes in boxes_of_stages] == [False] * 3


def test_initialization_of_heads():
    head = CascadeRoIHeads(4, 80).heads[0]
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert head.regressor.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not any(layer.bias.any() for layer in (head.fc1, head.fc2, head.classifier, head.regressor))


def test_no_proposals_and_no_targets():
    heads = CascadeRoIHeads(4, 2)
    features = {str(s): torch.rand(1, 4, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16, 32)}
    _, losses = heads(features, [torch.zeros(0, 4)], [(64, 64)], [target((), ())])
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    (detection,), _ = heads.eval()(features, [torch.zeros(0, 4)], [(64, 64)])
    assert detection['boxes'].shape == (0, 4)
