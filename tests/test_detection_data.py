"""Datasets in COCO's format with unusual and invalid entries, and COCO's figures against known values."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from coco_files import write_coco
from PIL import Image

from timm_spa.detection import DetectionError
from timm_spa.detection.data import CocoDataset, Mirrored, find_dataset, read_image
from timm_spa.detection.draw import draw_detections, side_by_side
from timm_spa.detection.evaluate import FIGURES, coco_figures, coco_results


def boxes_of(dataset, index=0):
    return dataset[index][1]['boxes'].tolist()


def make_detection(boxes, scores, labels=None):
    return dict(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), scores=torch.tensor(scores),
        labels=torch.tensor(labels or [0] * len(boxes)))


def test_boxes_are_corners_and_labels_start_from_0(tmp_path):
    dataset = CocoDataset(*write_coco(tmp_path, [5], [dict(bbox=[10, 20, 30, 40], image_id=5)]))
    image, target = dataset[0]
    assert image.shape == (3, 80, 100)
    assert image.dtype == torch.float32
    assert image[:, 0, 0].tolist() == pytest.approx([90 / 255, 120 / 255, 60 / 255])
    assert target['boxes'].tolist() == [[10, 20, 40, 60]]
    assert target['labels'].tolist() == [0]


def test_boxes_beyond_the_image_are_clipped_and_counted(tmp_path):
    boxes = ([-10, -10, 30, 40], [90, 70, 30, 40], [0, 0, 100, 80])
    dataset = CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=list(b)) for b in boxes]))
    assert boxes_of(dataset) == [[0, 0, 20, 30], [90, 70, 100, 80], [0, 0, 100, 80]]
    assert dataset.counts['clipped'] == 2
    assert '3 boxes of 1 categories; 2 clipped to the image' in dataset.describe()


def test_boxes_without_area_are_ignored_and_counted(tmp_path):
    boxes = ([10, 10, 0, 20], [10, 10, 20, -3], [200, 10, 20, 20], [10, 10, 1e-6, 20], [1, 1, 5, 5])
    dataset = CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=list(b)) for b in boxes]))
    assert boxes_of(dataset) == [[1, 1, 6, 6]]
    assert dataset.counts['without_area'] == 4
    assert '4 without area ignored' in dataset.describe()


def test_images_without_boxes_are_kept(tmp_path):
    dataset = CocoDataset(*write_coco(tmp_path, [1, 2, 3], [dict(bbox=[1, 1, 5, 5], image_id=2)]))
    assert len(dataset) == 3
    assert dataset[0][1]['boxes'].shape == (0, 4)
    assert dataset[0][1]['labels'].dtype == torch.long
    assert '3 images, 2 without boxes' in dataset.describe()


def test_missing_images_are_named(tmp_path):
    folder, file = write_coco(tmp_path, [1, 2, 3], [dict(bbox=[1, 1, 5, 5])])
    (folder / '2.png').unlink()
    with pytest.raises(DetectionError, match='1 of 3 images of .*x.json are missing in .*images: 2.png'):
        CocoDataset(folder, file)


@pytest.mark.parametrize('ids', [(0, 1, 2), (90, 7, 1000)])
def test_category_ids_with_gaps_or_from_0(tmp_path, ids):
    categories = [dict(id=i, name=f'thing {i}') for i in ids]
    annotations = [dict(bbox=[1, 1, 5, 5], category_id=i) for i in ids]
    dataset = CocoDataset(*write_coco(tmp_path, [1], annotations, categories))
    assert dataset.categories == [dict(id=i, name=f'thing {i}') for i in sorted(ids)]
    assert dataset[0][1]['labels'].tolist() == [sorted(ids).index(i) for i in ids]


def test_crowds_are_not_trained_on(tmp_path):
    runs = dict(counts=[5, 7, 100], size=[80, 100])
    dataset = CocoDataset(*write_coco(tmp_path, [1], [
        dict(bbox=[50, 50, 40, 20], iscrowd=1, segmentation=runs), dict(bbox=[1, 1, 9, 9], segmentation=runs)]))
    assert boxes_of(dataset) == [[1, 1, 10, 10]], 'a mask in run lengths does not turn a box into a crowd'
    assert '1 crowds not used for training' in dataset.describe()


def test_crowds_are_ignored_in_evaluation(tmp_path):
    """Three detections in the crowd have higher scores than the right one, and do not lower the figures."""
    annotations = [dict(bbox=[50, 40, 40, 30], iscrowd=1), dict(bbox=[1, 1, 40, 40], iscrowd=0)]
    dataset = CocoDataset(*write_coco(tmp_path, [1], annotations))
    in_crowd = [[50., 40, 70, 60], [60, 45, 80, 65], [70, 50, 90, 70]]
    figures = coco_figures(dataset, {0: make_detection([*in_crowd, [1, 1, 41, 41]], [0.9, 0.8, 0.7, 0.6])})
    assert figures['AP'] == pytest.approx(100)
    annotations[0]['iscrowd'] = 0
    dataset = CocoDataset(*write_coco(tmp_path, [1], annotations))
    assert coco_figures(dataset, {0: make_detection([*in_crowd, [1, 1, 41, 41]], [0.9, 0.8, 0.7, 0.6])})['AP'] < 30


@pytest.mark.parametrize(('what', 'images', 'annotations', 'categories'), [
    ('image id 4', [4, 4], [], None),
    ('annotation id 9', [1], [dict(bbox=[1, 1, 5, 5], id=9)] * 2, None),
    ('category id 1', [1], [], [dict(id=1, name='a'), dict(id=1, name='b')]),
    ("category name 'a'", [1], [], [dict(id=1, name='a'), dict(id=2, name='a')]),
    ("category name '7'", [1], [], [dict(id=1, name=7), dict(id=2, name='7')])])
def test_duplicate_ids(tmp_path, what, images, annotations, categories):
    with pytest.raises(DetectionError, match=f'x.json: duplicate {what}. Rename'):
        CocoDataset(*write_coco(tmp_path, images, annotations, categories))


def test_annotations_of_unknown_images_and_categories(tmp_path):
    with pytest.raises(DetectionError, match='annotation 1: unknown image_id 8'):
        CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=[1, 1, 5, 5], image_id=8)]))
    for key in ('image_id', 'category_id'):  # in Python, True is 1
        with pytest.raises(DetectionError, match=f'annotation 1: unknown {key} True'):
            CocoDataset(*write_coco(tmp_path, [1], [{'bbox': [1, 1, 5, 5], key: True}]))
    with pytest.raises(DetectionError, match='annotation 1: unknown category_id 8'):
        CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=[1, 1, 5, 5], category_id=8)]))


def test_categories_of_a_checkpoint(tmp_path):
    """Labels follow the names of the checkpoint. Ids and order of the file do not matter."""
    categories = [dict(id=1, name='cat'), dict(id=2, name='dog')]
    annotations = [dict(bbox=[1, 1, 5, 5], category_id=2), dict(bbox=[1, 1, 5, 5], category_id=1)]
    source = write_coco(tmp_path, [1], annotations, categories)
    known = [dict(id=7, name='dog'), dict(id=8, name='bird'), dict(id=9, name='cat')]
    dataset = CocoDataset(*source, categories=known)
    assert dataset[0][1]['labels'].tolist() == [0, 2]
    assert [c['id'] for c in dataset.categories] == [2, None, 1]
    with pytest.raises(DetectionError, match='that the detector was not trained on: dog. The detector knows bird, cat'):
        CocoDataset(*source, categories=known[1:])
    with pytest.raises(DetectionError, match='must have different names, got dog, dog, cat'):
        CocoDataset(*source, categories=[known[0], known[0], known[2]])


@pytest.mark.parametrize('name', [None, ['a'], True, 1.5])
def test_invalid_category_names(tmp_path, name):
    with pytest.raises(DetectionError, match='a category name must be a text or a whole number, got .*Rename'):
        CocoDataset(*write_coco(tmp_path, [1], [], [dict(id=1, name=name)]))


@pytest.mark.parametrize(('text', 'message'), [
    ('{', 'cannot be read as JSON'),
    ('[1, 2]', "is not in COCO's format: it must have the lists images, annotations, categories"),
    ('{"images": [], "annotations": []}', "is not in COCO's format"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', 'the list images is empty'),
    ('{"images": [{"id": 1}], "annotations": [], "categories": []}', 'the list categories is empty'),
    ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lacks 'file_name'"),
    ('{"images": [3], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "is not in COCO's format")])
def test_invalid_json_files(tmp_path, text, message):
    (tmp_path / 'x.json').write_text(text)
    with pytest.raises(DetectionError, match=message):
        CocoDataset(tmp_path, tmp_path / 'x.json')
    with pytest.raises(DetectionError, match=r'none.json cannot be read as JSON: No such file'):
        CocoDataset(tmp_path, tmp_path / 'none.json')


@pytest.mark.parametrize('box', [
    [1, 2, 3], [1, 2, math.nan, 4], [1, 2, True, 4], ['1', '2', '3', '4'], None, 7, [10 ** 400, 1, 2, 3]])
def test_invalid_boxes(tmp_path, box):
    with pytest.raises(DetectionError, match='annotation 1: bbox must be four numbers'):
        CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=box)]))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(bbox=...), 'annotation 1: bbox is missing'), (dict(image_id=...), 'annotation 1: image_id is missing'),
    (dict(area='large'), "annotation 1: area must be a number, got 'large'"),
    (dict(iscrowd='no'), "annotation 1: iscrowd must be a number, got 'no'")])
def test_annotations_with_missing_or_invalid_fields(tmp_path, change, message):
    folder, file = write_coco(tmp_path, [1], [dict(bbox=[1, 1, 5, 5])])
    content = json.loads(file.read_text())
    content['annotations'][0].update(change)
    content['annotations'][0] = {k: v for k, v in content['annotations'][0].items() if v is not ...}
    file.write_text(json.dumps(content))
    with pytest.raises(DetectionError, match=message):
        CocoDataset(folder, file)


@pytest.mark.parametrize(('area', 'expected'), [
    ('25', 25), (12.5, 12.5), (-1, 30), (0, 30), (None, 30), (math.nan, 30), (math.inf, 30)])
def test_areas(tmp_path, area, expected):
    """The area of the box replaces an invalid area."""
    dataset = CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=[1, 1, 5, 6], area=area)]))
    assert dataset.annotations[0][0]['area'] == expected
    assert coco_figures(dataset, {0: make_detection([[1, 1, 6, 7]], [0.9])})['AP'] == pytest.approx(100)


@pytest.mark.parametrize('width', [None, 'wide', 64.5, 0, -3])
def test_invalid_image_sizes(tmp_path, width):
    with pytest.raises(DetectionError, match='x.json: image 1: width must be a (whole )?number'):
        CocoDataset(*write_coco(tmp_path, [dict(id=1, width=width, file_name='1.png')], []))


def test_image_sizes_as_text(tmp_path):
    images = [dict(id=1, width='100.0', height=80., file_name='1.png')]
    assert CocoDataset(*write_coco(tmp_path, images, [])).sizes == [(100, 80)]


def test_image_sizes_in_file_headers(tmp_path):
    folder, file = write_coco(tmp_path, [1, 2], [])
    dataset = CocoDataset(folder, file)
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (80, 100)).save(folder / '1.png', exif=exif)
    dataset.check_images([0, 1])
    Image.new('RGB', (80, 100)).save(folder / '2.png')
    dataset.check_images([0])
    with pytest.raises(DetectionError, match='2.png has 80 x 100 pixels, but the annotations give 100 x 80'):
        dataset.check_images([0, 1])


def test_16_bit_images(tmp_path):
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    for name in ('x.png', 'x.tif'):
        Image.fromarray(values).save(tmp_path / name)
        assert read_image(tmp_path / name)[:, 0].tolist() == [[0, 1, 100, 255]] * 3


@pytest.mark.parametrize('mode', ['L', 'P', 'LA', 'RGBA', 'CMYK', '1'])
def test_images_of_other_modes(tmp_path, mode):
    Image.new('RGB', (6, 4), (255, 255, 255)).convert(mode).save(tmp_path / 'x.tif')
    image = read_image(tmp_path / 'x.tif', (6, 4))
    assert image.shape == (3, 4, 6)
    assert image.float().mean() > 250


def test_rotated_images(tmp_path):
    """Orientation 6 is a quarter turn: the stored image has 6 x 4 pixels, the shown image 4 x 6."""
    original = Image.new('RGB', (6, 4), (0, 0, 0))
    original.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6
    original.save(tmp_path / 'x.png', exif=exif)
    stored, shown = read_image(tmp_path / 'x.png', (6, 4)), read_image(tmp_path / 'x.png', (4, 6))
    assert stored.shape == (3, 4, 6)
    assert stored[0, 0, 0] == 255
    assert shown.shape == (3, 6, 4)
    assert shown[0, 0, 3] == 255
    assert torch.equal(read_image(tmp_path / 'x.png'), shown), 'without a given size, the image is read as it is shown'
    with pytest.raises(DetectionError, match='x.png has 6 x 4 pixels, but the annotations give 5 x 4'):
        read_image(tmp_path / 'x.png', (5, 4))


def test_damaged_images(tmp_path):
    (tmp_path / 'x.jpg').write_bytes(b'not an image')
    with pytest.raises(DetectionError, match='x.jpg cannot be read as an image'):
        read_image(tmp_path / 'x.jpg')


def test_mirrored_images(tmp_path):
    folder, file = write_coco(tmp_path, range(20), [dict(bbox=[10, 20, 30, 40], image_id=i) for i in range(20)])
    for i in range(20):
        original = Image.new('RGB', (100, 80))
        original.paste((255, 255, 255), (10, 20, 40, 60))
        original.save(folder / f'{i}.png')
    plain = CocoDataset(folder, file)
    epochs = []
    for epoch in (0, 1, 0):
        dataset = Mirrored(plain, 3, epoch)
        epochs.append([boxes_of(dataset, i)[0][0] for i in range(20)])
        assert [boxes_of(plain, i)[0][0] for i in range(20)] == [10] * 20
        for image, target in (dataset[i] for i in range(20)):
            x0, y0, x1, y1 = map(int, target['boxes'][0])
            assert image[:, y0:y1, x0:x1].min() == 1
            assert image.sum() == 3 * 30 * 40
    assert set(epochs[0]) == {10, 60}
    assert epochs[0] != epochs[1]
    assert epochs[0] == epochs[2]
    assert [boxes_of(Mirrored(plain, 4, 0), i)[0][0] for i in range(20)] != epochs[0], 'the seed matters'


@pytest.mark.parametrize(('images', 'file'), [
    ('train2017', 'annotations/instances_train2017.json'), ('train', 'train.json'), ('images/train', 'train.json'),
    ('train', 'annotations/instances_train.json'), ('train', 'train/_annotations.coco.json')])
def test_layouts(tmp_path, images, file):
    for split, name in (('train', 'train'), ('val', 'valid' if '_ann' in file else 'val')):
        folder, path = tmp_path / images.replace('train', name), tmp_path / file.replace('train', name)
        folder.mkdir(parents=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text('{}')
        assert find_dataset(tmp_path, split) == (folder, path)


def test_missing_and_ambiguous_datasets(tmp_path):
    message = "one JSON file for the split 'val'.*Found: none.*--val-images and --val-annotations"
    with pytest.raises(DetectionError, match=message):
        find_dataset(tmp_path, 'val')
    for name in ('train2014', 'train2017'):
        (tmp_path / name).mkdir()
        (tmp_path / f'{name}.json').write_text('{}')
    with pytest.raises(DetectionError, match='Found: train2014.json, train2017.json'):
        find_dataset(tmp_path, 'train')


# COCO's figures

def two_objects(tmp_path, **kwargs):
    annotations = [dict(bbox=[0, 0, 50, 50], **kwargs), dict(bbox=[50, 0, 50, 50])]
    if 'id' in kwargs:
        annotations[1]['id'] = 1
    return CocoDataset(*write_coco(tmp_path, [1], annotations))


def test_figures_by_hand(tmp_path):
    """COCO reads precision at 101 recalls. One detected object of two gives 51 of them, 0 to 0.5."""
    half = 100 * 51 / 101
    dataset = two_objects(tmp_path)
    figures = coco_figures(dataset, {0: make_detection([[0, 0, 50, 50]], [0.9])})
    assert tuple(figures) == FIGURES
    assert figures['AP'] == figures['AP50'] == figures['AP75'] == figures['AP_M'] == pytest.approx(half)
    assert figures['AR1'] == figures['AR100'] == pytest.approx(50)
    assert math.isnan(figures['AP_S'])
    assert math.isnan(figures['AP_L'])
    # the second box has an IoU of 0.62, so it is right at three of the ten thresholds: 0.5, 0.55 and 0.6
    figures = coco_figures(dataset, {0: make_detection([[0, 0, 50, 50], [50, 0, 100, 31]], [0.9, 0.8])})
    assert figures['AP'] == pytest.approx((3 * 100 + 7 * half) / 10)
    assert figures['AP50'] == pytest.approx(100)
    assert figures['AP75'] == pytest.approx(half)


def test_wrong_detections_of_another_size_do_not_count(tmp_path):
    """The best detection is wrong and large. It halves the AP, but not the AP of small objects."""
    dataset = CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=[0, 0, 10, 10])]))
    figures = coco_figures(dataset, {0: make_detection([[20, 20, 80, 80], [0, 0, 10, 10]], [0.9, 0.8])})
    assert figures['AP'] == pytest.approx(50)
    assert figures['AP_S'] == pytest.approx(100)


def test_detections_of_a_class_that_is_missing_in_the_file_do_not_count(tmp_path):
    source = write_coco(tmp_path, [1], [dict(bbox=[0, 0, 50, 50])])
    dataset = CocoDataset(*source, categories=[dict(id=5, name='bird'), dict(id=6, name='thing')])
    figures = coco_figures(dataset, {0: make_detection([[0, 0, 50, 50], [0, 0, 50, 50]], [0.9, 0.8], [0, 1])})
    assert figures['AP'] == pytest.approx(100)


def test_an_annotation_with_id_0_counts(tmp_path):
    dataset = two_objects(tmp_path, id=0)
    both = {0: make_detection([[0, 0, 50, 50], [50, 0, 100, 50]], [0.9, 0.8])}
    assert coco_figures(dataset, both)['AP'] == pytest.approx(100), 'pycocotools alone would return 50.5'


@pytest.mark.parametrize('indices', [(), (1,), (0, 1)])
def test_detections_of_other_images(tmp_path, indices):
    message = 'do not match the 1 images of .*x.json: indices .* are missing or unknown'
    with pytest.raises(DetectionError, match=message):
        coco_figures(two_objects(tmp_path), {index: make_detection([], []) for index in indices})


def test_detections_that_are_not_finite(tmp_path):
    """pycocotools alone counts a box of NaN as right."""
    for key in ('boxes', 'scores'):
        detection = make_detection([[0, 0, 50, 50]], [0.9])
        detection[key].view(-1)[-1] = math.nan
        with pytest.raises(DetectionError, match=f'Detections of image 0 have {key} that are not finite'):
            coco_figures(two_objects(tmp_path), {0: detection})


def test_figures_without_detections_or_boxes(tmp_path):
    assert coco_figures(two_objects(tmp_path), {0: make_detection([], [])})['AP'] == 0
    dataset = CocoDataset(*write_coco(tmp_path, [1], [dict(bbox=[0, 0, 9, 9], iscrowd=1)]))
    message = 'x.json cannot be used for evaluation: it contains no boxes, or crowds only'
    with pytest.raises(DetectionError, match=message):
        coco_figures(dataset, {0: make_detection([], [])})


def test_figures_without_pycocotools(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools.coco', None)
    with pytest.raises(DetectionError, match=r'pip install "timm_spa\[detection\]"'):
        coco_figures(two_objects(tmp_path), {0: make_detection([], [])})


def test_results_have_cocos_format():
    results = coco_results([make_detection([[10, 20, 40, 60], [0, 0, 1, 1]], [0.5, 0.25], [1, 0])], ['a'], [None, 18])
    assert results == [dict(image_id='a', category_id=18, bbox=[10, 20, 30, 40], score=0.5)]
    json.dumps(results)


@pytest.mark.parametrize('labels', [[-1], [2], [0., 1], [True]])
def test_invalid_labels(tmp_path, labels):
    detection = dict(make_detection([[0, 0, 1, 1]] * len(labels), [0.5] * len(labels)), labels=torch.tensor(labels))
    with pytest.raises(DetectionError, match=r"image 'a' have the labels .* Labels of 2 classes are 0 to 1"):
        coco_results([detection], ['a'], [3, 4])


# drawing

def test_drawing():
    image = torch.full((3, 300, 400), 128, dtype=torch.uint8)
    detection = make_detection([[50, 60, 150, 200], [200, 60, 300, 200], [10, 10, 40, 40]], [0.9, 0.8, 0.2], [0, 1, 0])
    drawing = draw_detections(image, detection, ['cat', 'a name that is long'], score=0.3)
    assert drawing.size == (800, 600), 'enlarged, so that names are readable'
    colours = {drawing.getpixel(point) for point in ((100, 300), (400, 300))}
    assert colours == {(0, 114, 178), (230, 159, 0)}
    assert drawing.getpixel((20, 50)) == (128, 128, 128), 'the score is too low'
    assert drawing.getpixel((200, 300)) == (128, 128, 128), 'boxes are not filled'
    pair = side_by_side({'a': drawing, 'b': drawing})
    assert pair.width == 2 * 800 + 4
    assert pair.height > 600
    assert draw_detections(image, make_detection([], []), []).getcolors() == [(800 * 600, (128, 128, 128))]
