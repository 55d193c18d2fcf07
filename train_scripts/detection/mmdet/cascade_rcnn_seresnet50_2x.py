"""Cascade R-CNN on SE-ResNet-50."""
_base_ = 'cascade_rcnn_resnet50_2x.py'
model = dict(backbone=dict(model='seresnet50'))
