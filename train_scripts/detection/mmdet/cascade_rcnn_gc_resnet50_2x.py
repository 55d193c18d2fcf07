"""Cascade R-CNN on ResNet-50 with global context blocks."""
_base_ = 'cascade_rcnn_resnet50_2x.py'
model = dict(backbone=dict(model='gc_resnet50'))
