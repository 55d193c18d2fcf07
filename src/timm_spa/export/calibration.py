"""Images to calibrate a quantization with."""
from pathlib import Path
from typing import Any, Iterator, Optional, Union

import torch

from ..predict import labelled_batches
from .format import padded

__all__ = ['CalibrationImages']

LIMIT = 128


class CalibrationImages:
    """Images of the subfolder `train` if it exists, else of the split that accuracy is measured on.

    Each iteration starts from the first image and reads one image at a time.

    Args:
        model: Model that the images are prepared for.
        images: Image folder.
        split: Subfolder that accuracy is measured on.
        batch_size: Fixed batch size of the file, which each image is repeated to; None for a dynamic batch size.
    """

    def __init__(self, model: Any, images: Union[str, Path], split: str, batch_size: Optional[int]) -> None:
        self.train = 'train' if split != 'train' and Path(images, 'train').is_dir() else split
        self.measured = self.train == split
        self.dataset: Any = labelled_batches(model, images, self.train, 1)[0].dataset
        self.batch_size = batch_size

    def __len__(self) -> int:
        return min(LIMIT, len(self.dataset))

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(len(self)):
            # the dataset is sorted by class: equal steps reach all classes
            pixels = torch.as_tensor(self.dataset[i * len(self.dataset) // len(self)][0]).unsqueeze(0)
            yield padded(pixels, self.batch_size)

    @property
    def note(self) -> str:
        """Sentence for the user."""
        same = ', the split that accuracy is measured on' if self.measured else ''
        return f'Calibrated on {len(self)} images of {self.train!r}{same}.'
