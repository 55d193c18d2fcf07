"""Cascade R-CNN with GC."""
_base_ = 'cascade_rcnn_resnet50_2x.py'
model = dict(backbone=dict(model='gc_resnet50'))
