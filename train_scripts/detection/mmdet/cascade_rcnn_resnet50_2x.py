"""Cascade R-CNN on ResNet-50."""
_base_ = ['mmdet::_base_/models/cascade-rcnn_r50_fpn.py', 'schedule_2x.py']
model = dict(
    backbone=dict(_delete_=True, type='TimmBackbone', model='resnet50', pretrained=True, frozen_stages=1))
