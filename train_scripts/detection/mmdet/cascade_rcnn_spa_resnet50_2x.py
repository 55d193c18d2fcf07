"""Cascade R-CNN on ResNet-50 with spatial pyramid attention."""
_base_ = 'cascade_rcnn_resnet50_2x.py'
model = dict(backbone=dict(model='spa_resnet50'))
