"""Detections drawn into images, for one detector or several next to each other, as in figure 7 of the paper."""
from typing import Dict, Mapping, Sequence

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

__all__ = ['draw_detections', 'side_by_side']

# Okabe and Ito's colours, which red-green colour-blind readers can distinguish
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00')
SHORTEST_SIDE = 512  # pixels: smaller images are enlarged so that the class names are readable
DARK = 110  # grey value below which text on a colour is white


def draw_detections(
        image: torch.Tensor,
        detection: Dict[str, torch.Tensor],
        names: Sequence[str],
        score: float = 0.3,
) -> Image.Image:
    """Draws boxes with class names and scores.

    Args:
        image: Image (3, H, W), uint8. A small image is enlarged.
        detection: 'boxes', 'labels' and 'scores', as a detector returns them.
        names: Name of each class, in the order of the labels. Six colours are repeated over the classes.
        score: Lowest score to draw.
    """
    scale = max(1, round(SHORTEST_SIDE / min(image.shape[-2:])))
    image = image.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    keep = detection['scores'] >= score
    boxes, labels = detection['boxes'][keep] * scale, detection['labels'][keep].tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    font_size = max(12, min(image.shape[-2:]) // 36)
    if len(boxes):
        image = draw_bounding_boxes(image, boxes, colors=list(colours), width=max(2, font_size // 6))
    canvas = to_pil_image(image)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(font_size)
    for box, label, colour, value in zip(
            boxes.tolist(), labels, colours, detection['scores'][keep].tolist(), strict=True):
        text = f'{names[label]} {value:.2f}'
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = max(0, min(box[0], canvas.width - right - 4))
        y = box[1] - bottom - 4 if box[1] > bottom + 4 else box[1]
        draw.rectangle((x, y, x + right + 4, y + bottom + 4), fill=colour)
        grey = ImageColor.getcolor(colour, 'L')
        draw.text((x + 2, y + 2), text, fill='white' if isinstance(grey, int) and grey < DARK else 'black', font=font)
    return canvas


def side_by_side(images: Mapping[str, Image.Image]) -> Image.Image:
    """Puts images of the same size next to each other, each below its title.

    Args:
        images: Images by title.
    """
    width, height = next(iter(images.values())).size
    title_height, gap = max(18, width // 24), 4
    canvas = Image.new('RGB', ((width + gap) * len(images) - gap, height + title_height), 'white')
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(title_height * 0.7)
    for number, (title, image) in enumerate(images.items()):
        x = number * (width + gap)
        canvas.paste(image, (x, title_height))
        draw.text((x + 2, 0), title, fill='black', font=font)
    return canvas
