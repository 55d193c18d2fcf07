"""What a detector finds in the images of a dataset, and COCO's figures for it."""
import contextlib
import io
import math
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

import torch
from torch.utils.data import DataLoader, Subset

from ..checkpoints.fit import first_few
from .backbone import DetectionError
from .data import CocoDataset, collate, read_batches

__all__ = ['FIGURES', 'coco_figures', 'coco_results', 'detect']

# in the order of pycocotools: average precision by IoU and by size, average recall by detections and by size
FIGURES = ('AP', 'AP50', 'AP75', 'AP_S', 'AP_M', 'AP_L', 'AR1', 'AR10', 'AR100', 'AR_S', 'AR_M', 'AR_L')

Detection = Dict[str, torch.Tensor]


def detect(
        model: Any,
        dataset: CocoDataset,
        batch_size: int = 8,
        workers: int = 0,
        places: Optional[Sequence[int]] = None,
) -> Dict[int, Detection]:
    """Runs a detector over a dataset.

    Args:
        model: Detector; it is in eval mode afterwards.
        dataset: The images.
        batch_size: Images at a time.
        workers: Processes that read images.
        places: Places of the images in the dataset; all if None.

    Returns:
        For each place 'boxes' (R, 4: left, top, right, bottom in pixels of the image), 'labels' and 'scores', on the
        CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    places = range(len(dataset)) if places is None else places
    loader = DataLoader(Subset(dataset, places), batch_size, num_workers=workers, collate_fn=collate)
    found: List[Detection] = []
    with torch.inference_mode():
        for images, _ in read_batches(loader):
            found += [
                {key: value.cpu() for key, value in of_image.items()}
                for of_image in model([image.to(device) for image in images])]
    return dict(zip(places, found, strict=True))


def coco_results(
        detections: Iterable[Detection],
        image_ids: Iterable[Any],
        category_ids: Sequence[Any],
) -> List[Dict[str, Any]]:
    """Writes detections in COCO's results format.

    Args:
        detections: Detections of each image.
        image_ids: Id of each image.
        category_ids: Id of each class, by its label; what is found of a class without one (None) is left out.

    Returns:
        A list of 'image_id', 'category_id', 'bbox' (left, top, width, height) and 'score'.

    Raises:
        DetectionError: A label is not an integer from 0 to the number of classes - 1, or a value is not finite.
    """
    results = []
    for image_id, found in zip(image_ids, detections, strict=True):
        labels = found['labels']
        if len(labels) and (labels.dtype != torch.long or labels.min() < 0 or labels.max() >= len(category_ids)):
            raise DetectionError(
                f'Detections of image {image_id!r} have the labels {sorted(set(labels.tolist()))} ({labels.dtype}). '
                f'Labels of {len(category_ids)} classes are 0 to {len(category_ids) - 1} as torch.int64.')
        bad = [key for key in ('boxes', 'scores') if not found[key].isfinite().all()]
        if bad:  # pycocotools would count a box of NaN as right
            raise DetectionError(
                f'Detections of image {image_id!r} have {" and ".join(bad)} that are not finite. Check the weights of '
                'the detector, or run it without mixed precision.')
        for box, label, score in zip(*(found[key].tolist() for key in ('boxes', 'labels', 'scores')), strict=True):
            if category_ids[label] is not None:
                left, top, right, bottom = box
                results.append(dict(
                    image_id=image_id, category_id=category_ids[label], bbox=[left, top, right - left, bottom - top],
                    score=score))
    return results


def coco_figures(dataset: CocoDataset, detections: Mapping[int, Detection]) -> Dict[str, float]:
    """Computes COCO's twelve figures by pycocotools.

    Args:
        dataset: Images and true boxes.
        detections: Detections of every image, by its place.

    Returns:
        The figures in percent, by the names in `FIGURES`; NaN for a size of which there is no box.

    Raises:
        DetectionError: pycocotools is missing, there is no box to find, or an image has no detections (which may be
            empty), or detections that are not finite.
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
            f'Detections must be those of the {len(dataset)} images of {dataset.source}, one entry for each place: '
            f'{first_few(list(map(str, unmatched)))} missing or unknown. Give empty tensors where nothing is found.')
    # labels and places in place of ids, which may be of any kind
    truth = [
        dict(image_id=place, category_id=a['label'], bbox=a['bbox'], area=a['area'], iscrowd=a['iscrowd'])
        for place, of_image in enumerate(dataset.annotations) for a in of_image]
    labels = range(len(dataset.categories))
    found = coco_results(detections.values(), detections, labels)
    for result in found:
        result.update(area=result['bbox'][2] * result['bbox'][3], iscrowd=0)

    def indexed(entries: List[Dict[str, Any]]) -> Any:
        coco = COCO()
        coco.dataset = dict(
            images=[dict(id=place) for place in range(len(dataset))], categories=[dict(id=label) for label in labels],
            # from 1: pycocotools treats a match with id 0 as no match
            annotations=[dict(entry, id=number) for number, entry in enumerate(entries, start=1)])
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
        evaluation = COCOeval(indexed(truth), indexed(found), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        name: math.nan if value < 0 else 100 * float(value)
        for name, value in zip(FIGURES, evaluation.stats, strict=True)}


def check_evaluable(dataset: CocoDataset) -> None:
    """Raises a DetectionError if there is nothing to find in a dataset."""
    if all(a['iscrowd'] for of_image in dataset.annotations for a in of_image):
        raise DetectionError(f'{dataset.source} has no box to find: nothing can be evaluated on it.')
