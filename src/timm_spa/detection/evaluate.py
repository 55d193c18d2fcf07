"""Detections for the images of a dataset, and COCO's figures for them."""
import contextlib
import io
import math
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

import torch

from ..checkpoints.fit import first_few
from .backbone import DetectionError
from .data import CocoDataset, create_loader, read_batches

__all__ = ['FIGURES', 'check_evaluable', 'coco_figures', 'coco_results', 'detect']

# in the order of pycocotools: average precision by IoU and by size, average recall by detections and by size
FIGURES = ('AP', 'AP50', 'AP75', 'AP_S', 'AP_M', 'AP_L', 'AR1', 'AR10', 'AR100', 'AR_S', 'AR_M', 'AR_L')

Detection = Dict[str, torch.Tensor]


def detect(
        model: Any,
        dataset: CocoDataset,
        batch_size: int = 8,
        workers: int = 0,
        indices: Optional[Sequence[int]] = None,
) -> Dict[int, Detection]:
    """Runs a detector on a dataset.

    Args:
        model: Detector. It is left in eval mode.
        dataset: Images.
        batch_size: Images per batch.
        workers: Number of processes that read images.
        indices: Indices of the images in the dataset; all if None.

    Returns:
        For each index 'boxes' (R, 4: left, top, right, bottom in pixels of the image), 'labels' and 'scores', on the
        CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    indices = range(len(dataset)) if indices is None else indices
    detections: List[Detection] = []
    with torch.inference_mode():
        for images, _ in read_batches(create_loader(dataset, indices, batch_size, workers)):
            for detection in model([image.to(device) for image in images]):
                detections.append({key: value.cpu() for key, value in detection.items()})
    return dict(zip(indices, detections, strict=True))


def coco_results(
        detections: Iterable[Detection],
        image_ids: Iterable[Any],
        category_ids: Sequence[Any],
) -> List[Dict[str, Any]]:
    """Converts detections to COCO's results format.

    Args:
        detections: Detections of each image.
        image_ids: Id of each image.
        category_ids: Id of each class, in the order of the labels. Detections of a class whose id is None are left
            out.

    Returns:
        A list of 'image_id', 'category_id', 'bbox' (left, top, width, height) and 'score'.

    Raises:
        DetectionError: A label is not an integer from 0 to the number of classes - 1, or a value is not finite.
    """
    results = []
    for image_id, detection in zip(image_ids, detections, strict=True):
        labels = detection['labels']
        if len(labels) and (labels.dtype != torch.long or labels.min() < 0 or labels.max() >= len(category_ids)):
            raise DetectionError(
                f'Detections of image {image_id!r} have the labels {sorted(set(labels.tolist()))} ({labels.dtype}). '
                f'Labels of {len(category_ids)} classes are 0 to {len(category_ids) - 1} as torch.int64.')
        invalid = [key for key in ('boxes', 'scores') if not detection[key].isfinite().all()]
        if invalid:  # pycocotools would count a box of NaN as right
            raise DetectionError(
                f'Detections of image {image_id!r} have {" and ".join(invalid)} that are not finite. Check the weights '
                'of the detector, or run it without mixed precision.')
        for box, label, score in zip(*(detection[key].tolist() for key in ('boxes', 'labels', 'scores')), strict=True):
            if category_ids[label] is not None:
                left, top, right, bottom = box
                results.append(dict(
                    image_id=image_id, category_id=category_ids[label], bbox=[left, top, right - left, bottom - top],
                    score=score))
    return results


def coco_figures(dataset: CocoDataset, detections: Mapping[int, Detection]) -> Dict[str, float]:
    """Computes COCO's twelve figures with pycocotools.

    Args:
        dataset: Images and true boxes.
        detections: Detections of every image, by its index.

    Returns:
        The figures in percent, by the names in `FIGURES`. A figure for a size without true boxes is NaN.

    Raises:
        DetectionError: pycocotools is missing, the dataset has no boxes, an image is missing in `detections` (an
            image without detections needs empty tensors), or detections are not finite.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as e:
        raise DetectionError('Evaluation needs pycocotools: pip install "timm_spa[detection]".') from e
    check_evaluable(dataset)
    unmatched = sorted(detections.keys() ^ set(range(len(dataset))))
    if unmatched:
        raise DetectionError(
            f'Detections do not match the {len(dataset)} images of {dataset.source}: indices '
            f'{first_few(list(map(str, unmatched)))} are missing or unknown. Give one entry per image, with empty '
            'tensors for an image without detections.')
    # labels and indices replace the ids of the file, which may have any type
    truth = [
        dict(image_id=index, category_id=a['label'], bbox=a['bbox'], area=a['area'], iscrowd=a['iscrowd'])
        for index, annotations in enumerate(dataset.annotations) for a in annotations]
    results = coco_results(detections.values(), detections, range(len(dataset.categories)))
    for result in results:
        result.update(area=result['bbox'][2] * result['bbox'][3], iscrowd=0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        evaluation = COCOeval(_filled(COCO(), dataset, truth), _filled(COCO(), dataset, results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: math.nan if value < 0 else 100 * float(value)
        for name, value in zip(FIGURES, evaluation.stats, strict=True)}


def _filled(coco: Any, dataset: CocoDataset, entries: List[Dict[str, Any]]) -> Any:
    """Returns an empty index of pycocotools after adding true boxes or detections."""
    coco.dataset = dict(
        images=[dict(id=index) for index in range(len(dataset))],
        categories=[dict(id=label) for label in range(len(dataset.categories))],
        # ids start from 1, because pycocotools treats a match with id 0 as no match
        annotations=[dict(entry, id=number) for number, entry in enumerate(entries, start=1)])
    coco.createIndex()
    return coco


def check_evaluable(dataset: CocoDataset) -> None:
    """Raises a DetectionError if a dataset has no boxes other than crowds."""
    if all(a['iscrowd'] for annotations in dataset.annotations for a in annotations):
        raise DetectionError(
            f'{dataset.source} cannot be used for evaluation: it contains no boxes, or crowds only. Add annotations.')
