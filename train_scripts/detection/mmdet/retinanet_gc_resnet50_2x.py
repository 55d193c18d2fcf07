"""RetinaNet on ResNet-50 with global context blocks."""
_base_ = 'retinanet_resnet50_2x.py'
model = dict(backbone=dict(model='gc_resnet50'))
