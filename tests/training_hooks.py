"""Test hooks for timm's train.py, imported by `--device-modules training_hooks`.

DistributedDataParallel gets no device ids, as required on a CPU. Batch norm uses running statistics, so that two
processes with N images each compute the same as one process with 2N images. The environment variable KILL_AT is an
epoch during which the process is killed, KILL_SAVING an epoch while whose checkpoint is written.
"""
import os
import signal

import torch.nn as nn
import torch.nn.functional as F
from timm import utils
from timm.task import ClassificationTask


def prepare_distributed(self, device_ids=None, **kwargs):
    self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids=None, **kwargs)
    return self


def normalize_by_running_statistics(
        x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    return normalize_by_running_statistics.original(x, running_mean, running_var, weight, bias, False, momentum, eps)


def kill_in_forward(self, input, target):
    kill_in_forward.calls += 1
    if kill_in_forward.calls == int(os.environ['KILL_AT']) + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return kill_in_forward.original(self, input, target)


def kill_in_save(self, save_path, epoch, metric=None):
    if epoch == int(os.environ['KILL_SAVING']):
        with open(save_path, 'wb') as f:
            f.write(b'partial')
        os.kill(os.getpid(), signal.SIGKILL)
    kill_in_save.original(self, save_path, epoch, metric)


ClassificationTask.prepare_distributed = prepare_distributed
# called by nn.BatchNorm2d and timm's BatchNormAct2d
normalize_by_running_statistics.original = F.batch_norm
F.batch_norm = normalize_by_running_statistics
if 'KILL_AT' in os.environ:  # with one step per epoch
    kill_in_forward.calls, kill_in_forward.original = 0, ClassificationTask.forward
    ClassificationTask.forward = kill_in_forward
if 'KILL_SAVING' in os.environ:
    kill_in_save.original = utils.CheckpointSaver._save
    utils.CheckpointSaver._save = kill_in_save
