"""COCO with the paper's 24 epochs: mmdet's 2x schedule, with the first decay after 18 epochs instead of 16."""
_base_ = [
    'mmdet::_base_/datasets/coco_detection.py', 'mmdet::_base_/schedules/schedule_2x.py',
    'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports='timm_spa.detection.mmdet')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=24, by_epoch=True, milestones=[18, 22], gamma=0.1)]
# averages the statistics of the gates' norm layers, which otherwise differ between processes
custom_hooks = [dict(type='SyncBuffersHook')]
