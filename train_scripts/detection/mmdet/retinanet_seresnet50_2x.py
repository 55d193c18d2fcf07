"""RetinaNet on SE-ResNet-50."""
_base_ = 'retinanet_resnet50_2x.py'
model = dict(backbone=dict(model='seresnet50'))
