"""Detections drawn into images, for one detector or several side by side, as the paper's figure 7."""
from typing import Dict, Mapping, Sequence

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from ..explain.figures import COLOURS

__all__ = ['draw_detections', 'side_by_side']

SHORTEST_SIDE = 512  # pixels: smaller images are enlarged, so that the names are read
DARK = 110  # grey value below which the text on a colour is white


def draw_detections(
        image: torch.Tensor,
        detection: Dict[str, torch.Tensor],
        names: Sequence[str],
        score: float = 0.3,
) -> Image.Image:
    """Draws boxes with their names and scores into an image (3, H, W), uint8, enlarged if it is small.

    A class has one colour of six, which people tell apart who see no red or no green; its name stands at the box.
    """
    scale = max(1, round(SHORTEST_SIDE / min(image.shape[-2:])))
    image = image.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    keep = detection['scores'] >= score
    boxes, labels = detection['boxes'][keep] * scale, detection['labels'][keep].tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    size = max(12, min(image.shape[-2:]) // 36)
    if len(boxes):
        image = draw_bounding_boxes(image, boxes, colors=list(colours), width=max(2, size // 6))
    picture = to_pil_image(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for box, label, colour, value in zip(
            boxes.tolist(), labels, colours, detection['scores'][keep].tolist(), strict=True):
        text = f'{names[label]} {value:.2f}'
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = max(0, min(box[0], picture.width - right - 4))
        y = box[1] - bottom - 4 if box[1] > bottom + 4 else box[1]
        draw.rectangle((x, y, x + right + 4, y + bottom + 4), fill=colour)
        grey = ImageColor.getcolor(colour, 'L')
        draw.text((x + 2, y + 2), text, fill='white' if isinstance(grey, int) and grey < DARK else 'black', font=font)
    return picture


def side_by_side(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Puts images of the same size beside each other, by their titles, which stand above."""
    width, height = next(iter(pictures.values())).size
    strip, gap = max(18, width // 24), 4
    whole = Image.new('RGB', ((width + gap) * len(pictures) - gap, height + strip), 'white')
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(strip * 0.7)
    for number, (title, picture) in enumerate(pictures.items()):
        whole.paste(picture, (number * (width + gap), strip))
        draw.text((number * (width + gap) + 2, 0), title, fill='black', font=font)
    return whole
