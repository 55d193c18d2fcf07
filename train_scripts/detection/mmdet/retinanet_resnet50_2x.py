"""RetinaNet on ResNet-50."""
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'schedule_2x.py']
model = dict(
    backbone=dict(_delete_=True, type='TimmBackbone', model='resnet50', pretrained=True, frozen_stages=1))
optim_wrapper = dict(optimizer=dict(lr=0.01))
