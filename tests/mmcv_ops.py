"""Replaces mmcv's compiled operators, which most builds of mmcv lack, by torchvision's nms and roi_align.

Import this module before mmdet. It supports RetinaNet, Faster R-CNN and Cascade R-CNN on a CPU. All other operators
raise an error.
"""
import importlib.machinery
import importlib.util
import sys
import types

import torch
from torchvision.ops import nms, roi_align


class Operators(types.ModuleType):
    """Stands in for mmcv._ext. mmcv looks up all operators when it is imported, and passes tensors to write to."""

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(
                f'{name} is not available: mmcv was built without its operators. Build it as in docs/detection.md.')

        return missing

    @staticmethod
    def nms(boxes, scores, iou_threshold, offset):
        assert offset == 0
        return nms(boxes, scores, iou_threshold)

    @staticmethod
    def roi_align_forward(
            x, rois, output, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio,
            pool_mode, aligned):
        assert pool_mode == 1, 'only the mean is supported'
        output.copy_(roi_align(x, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned))

    @staticmethod
    def roi_align_backward(
            gradient, rois, argmax_y, argmax_x, output, aligned_height, aligned_width, spatial_scale, sampling_ratio,
            pool_mode, aligned):
        with torch.enable_grad():  # linear in the feature map, so the gradient is the same for every feature map
            x = torch.zeros_like(output, requires_grad=True)
            y = roi_align(x, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
        output.copy_(torch.autograd.grad(y, x, gradient)[0])


if importlib.util.find_spec('mmcv._ext') is None:
    module = Operators('mmcv._ext')
    module.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)  # mmengine checks it
    sys.modules['mmcv._ext'] = module
