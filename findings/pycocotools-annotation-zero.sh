#!/usr/bin/env bash
# COCO evaluation counts a perfect detection as wrong if its annotation has id 0.
#
# Versions: pycocotools 2.0.11, numpy 2.4.6
# Expected: annotation ids are names. Numbering them from 0 or from 1 gives the same average precision.
# Observed: the evaluation stores the id of the matched annotation and reads 0 as "not matched". With three perfect detections the average
#   precision falls from 1.0 to 0.44 because one id is 0. No message is given.
# Output:
#   three perfect detections: AP 1.000 with ids 1, 2, 3 and 0.442 with ids 0, 1, 2
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: hand-made COCO files numbered with enumerate(). Remedy: number annotations from 1.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet pycocotools==2.0.11 numpy==2.4.6

cat > check.py <<'EOF'
import contextlib
import io
import sys

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(first_id):
    boxes = [[20 * i, 0, 10, 10] for i in range(3)]
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "box"}],
        "annotations": [
            {"id": first_id + i, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            for i, box in enumerate(boxes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([
            {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 - 0.1 * i} for i, box in enumerate(boxes)])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


from_one, from_zero = average_precision(1), average_precision(0)
print(f"three perfect detections: AP {from_one:.3f} with ids 1, 2, 3 and {from_zero:.3f} with ids 0, 1, 2")
if from_zero == from_one:
    sys.exit("Changed: the id 0 is a valid match.")
EOF
venv/bin/python check.py
