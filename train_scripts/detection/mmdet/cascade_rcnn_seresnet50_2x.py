"""Cascade R-CNN with SE."""
_base_ = 'cascade_rcnn_resnet50_2x.py'
model = dict(backbone=dict(model='seresnet50'))
