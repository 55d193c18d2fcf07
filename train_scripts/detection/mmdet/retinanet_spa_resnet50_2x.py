"""RetinaNet on ResNet-50 with spatial pyramid attention."""
_base_ = 'retinanet_resnet50_2x.py'
model = dict(backbone=dict(model='spa_resnet50'))
