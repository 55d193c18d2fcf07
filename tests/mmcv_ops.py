"""torchvision's nms and roi_align in the place of mmcv's compiled operators, which few builds of mmcv have.

Import it before mmdet. Enough for RetinaNet, Faster R-CNN and Cascade R-CNN on a CPU; every other operator raises.
"""
import importlib.machinery
import importlib.util
import sys
import types

import torch
from torchvision.ops import nms, roi_align


class StandIn(types.ModuleType):
    """mmcv._ext: mmcv looks up every operator when it is imported, and calls it with tensors to write to."""

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(f'mmcv was built without its operators, and torchvision has no {name}.')

        return missing

    @staticmethod
    def nms(boxes, scores, iou_threshold, offset):
        assert offset == 0
        return nms(boxes, scores, iou_threshold)

    @staticmethod
    def roi_align_forward(
            x, rois, output, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio,
            pool_mode, aligned):
        assert pool_mode == 1, 'the mean'
        output.copy_(roi_align(x, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned))

    @staticmethod
    def roi_align_backward(
            gradient, rois, argmax_y, argmax_x, output, aligned_height, aligned_width, spatial_scale, sampling_ratio,
            pool_mode, aligned):
        with torch.enable_grad():  # linear in the map: any map has this gradient
            x = torch.zeros_like(output, requires_grad=True)
            y = roi_align(x, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio, aligned)
        output.copy_(torch.autograd.grad(y, x, gradient)[0])


if importlib.util.find_spec('mmcv._ext') is None:
    module = StandIn('mmcv._ext')
    module.__spec__ = importlib.machinery.ModuleSpec('mmcv._ext', None)  # mmengine looks for it
    sys.modules['mmcv._ext'] = module
