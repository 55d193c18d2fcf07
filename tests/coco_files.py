"""Small datasets in COCO's format, written by tests."""
import json
import random

from PIL import Image, ImageDraw

NAMES = ('red', 'green', 'blue')


def write_coco(folder, images, annotations, categories=None, name='x.json', size=(100, 80)):
    """Writes images and a JSON file. Images are ids or dicts; annotations may omit id, image_id and category_id."""
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    entries = [
        dict(dict(file_name=f'{i}.png', width=size[0], height=size[1]), **(i if isinstance(i, dict) else dict(id=i)))
        for i in images]
    boxes = [dict(dict(id=n, image_id=entries[0]['id'], category_id=1), **a) for n, a in enumerate(annotations, 1)]
    if categories is None:
        categories = [dict(id=1, name='thing')]
    for entry in entries:
        Image.new('RGB', size, (90, 120, 60)).save(folder / 'images' / entry['file_name'])
    (folder / name).write_text(json.dumps(dict(images=entries, annotations=boxes, categories=categories)))
    return folder / 'images', folder / name


def write_rectangles(folder, count=8, size=128, repeats=1, splits=('train', 'val')):
    """Writes images with three coloured rectangles each. train.json lists every image `repeats` times."""
    rng = random.Random(0)
    images, boxes = [], []
    for split in splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new('RGB', (size, size), (90, 90, 90))
        draw = ImageDraw.Draw(image)
        half = size // 2
        rectangles = []
        for k, (x, y) in enumerate(rng.sample([(0, 0), (half, 0), (0, half), (half, half)], 3)):
            w, h = rng.randint(size // 4, half - 8), rng.randint(size // 4, half - 8)
            x, y = x + rng.randint(0, half - w), y + rng.randint(0, half - h)
            colour = (i + k) % 3
            fill = ((255, 40, 40), (40, 255, 40), (40, 40, 255))[colour]
            draw.rectangle((x, y, x + w - 1, y + h - 1), fill=fill)
            rectangles.append(dict(category_id=colour + 1, bbox=[x, y, w, h], area=w * h, iscrowd=0))
        for split in splits:
            image.save(folder / split / f'{i}.png')
        for repeat in range(repeats):
            images.append(dict(id=repeat * count + i, file_name=f'{i}.png', width=size, height=size))
            boxes += [dict(box, id=len(boxes) + n, image_id=images[-1]['id']) for n, box in enumerate(rectangles, 1)]
    categories = [dict(id=i, name=name) for i, name in enumerate(NAMES, 1)]
    for split in splits:
        kept = images if split == 'train' else images[:count]
        ids = {image['id'] for image in kept}
        (folder / f'{split}.json').write_text(json.dumps(dict(
            images=kept, annotations=[box for box in boxes if box['image_id'] in ids], categories=categories)))
    return folder
