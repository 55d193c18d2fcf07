#!/usr/bin/env bash
# Lightning's sync_batchnorm removes the activations of timm's networks.
#
# Versions: lightning 2.6.6, timm 1.0.31, torch 2.14.1, torchvision 0.29.1
# Expected: Trainer(sync_batchnorm=True) changes how statistics are gathered, not what the network computes.
# Observed: it calls torch.nn.SyncBatchNorm.convert_sync_batchnorm, which treats timm's BatchNormAct2d (norm and activation in one module)
#   as a BatchNorm2d. The new layer still lists `act` and `drop` as children, so print() looks right, but never calls them. The outputs
#   equal those of a network without these activations.
# Output:
#   first norm after Lightning's conversion: SyncBatchNorm( 32, eps=1e-05, momentum=0.1, affine=True, bias=True,
#   track_running_stats=True (drop): Identity() (act): ReLU6(inplace=True) )
#   Lightning equals the network: False
#   Lightning equals the network without activations: True
#   timm's own conversion equals the network: True
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: EfficientNet, MobileNet, DenseNet, ResNetV2 and others of timm trained with Lightning's option or torch's function.
#   Remedy: call `timm.layers.convert_sync_batchnorm` and leave the option off.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 lightning==2.6.6

cat > check.py <<'EOF'
import copy
import sys

import timm
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import BatchNormAct2d, convert_sync_batchnorm

torch.manual_seed(0)
model = timm.create_model("efficientnet_lite0", num_classes=5).eval()
linear = copy.deepcopy(model)
for module in linear.modules():
    if isinstance(module, BatchNormAct2d):
        module.act = torch.nn.Identity()
# The layer that Trainer(sync_batchnorm=True) applies to the model.
converted = TorchSyncBatchNorm().apply(copy.deepcopy(model)).eval()
converted_timm = convert_sync_batchnorm(copy.deepcopy(model)).eval()

image = torch.rand(2, 3, 64, 64)
with torch.inference_mode():
    reference, plain = model(image), linear(image)
    result, result_timm = converted(image), converted_timm(image)
print("first norm after Lightning's conversion:", " ".join(str(converted.bn1).split()))
print("Lightning equals the network:", torch.allclose(result, reference))
print("Lightning equals the network without activations:", torch.equal(result, plain))
print("timm's own conversion equals the network:", torch.allclose(result_timm, reference))
if not torch.equal(result, plain):
    sys.exit("Changed: the conversion keeps the activations.")
EOF
venv/bin/python check.py
