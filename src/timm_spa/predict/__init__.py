"""Class predictions for images, by any model that timm can create."""
from .classes import class_names, find_class
from .classify import (
    Prediction,
    data_config,
    default_split,
    image_reader,
    image_seen,
    labelled_batches,
    likeliest_classes,
    picture_reader,
    picture_seen,
    predict,
)
from .image_files import ImageError, PictureError, image_files, in_eight_bits
from .loading import ModelError, for_inference, load_model, on_device
from .sample_images import sample_image, sample_images

__all__ = [
    'ImageError', 'ModelError', 'PictureError', 'Prediction', 'class_names', 'data_config', 'default_split',
    'find_class', 'for_inference', 'image_files', 'image_reader', 'image_seen', 'in_eight_bits', 'labelled_batches',
    'likeliest_classes', 'load_model', 'on_device', 'picture_reader', 'picture_seen', 'predict', 'sample_image',
    'sample_images']
