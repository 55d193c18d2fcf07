"""COCO, and the paper's 24 epochs: mmdet's 2x schedule, but for the rate's first drop (18; mmdet: 16)."""
_base_ = [
    'mmdet::_base_/datasets/coco_detection.py', 'mmdet::_base_/schedules/schedule_2x.py',
    'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports='timm_spa.detection.mmdet')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=24, by_epoch=True, milestones=[18, 22], gamma=0.1)]
# the gates' norm layers learn statistics, which mmdet leaves different in each process
custom_hooks = [dict(type='SyncBuffersHook')]
