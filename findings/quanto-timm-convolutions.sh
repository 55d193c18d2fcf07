#!/usr/bin/env bash
# optimum-quanto replaces timm's special convolutions with plain ones.
#
# Versions: optimum-quanto 0.2.7, timm 1.0.31, torch 2.14.1, torchvision 0.29.1
# Expected: int8 weights change the outputs by a few per cent, or layers that quanto does not know stay in float.
# Observed: every subclass of nn.Conv2d becomes a QConv2d that runs nn.Conv2d's forward. ScaledStdConv2d loses the standardisation of
#   its weights, and Conv2dSame its padding: the output is smaller. No message is given.
# Output:
#   mobilenetv2_100: relative difference with int8 weights 0.098
#   resnetv2_50: relative difference with int8 weights 0.024
#   nf_regnet_b0: relative difference with int8 weights 5.026
#   Conv2dSame, stride 2: output (2, 8, 32, 32) before, (2, 8, 31, 31) after
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: NFNets and tf_* networks of timm. Remedy: pass `exclude` with the names of these layers.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 optimum-quanto==0.2.7

cat > check.py <<'EOF'
import copy
import sys

import timm
import torch
from optimum.quanto import freeze, qint8, quantize
from timm.layers import Conv2dSame


def quantized(model):
    model = copy.deepcopy(model)
    quantize(model, weights=qint8)
    freeze(model)
    return model


torch.manual_seed(0)
image = torch.rand(2, 3, 64, 64)
errors = {}
with torch.inference_mode():
    for name in ("mobilenetv2_100", "resnetv2_50", "nf_regnet_b0"):
        model = timm.create_model(name, num_classes=5).eval()
        reference = model(image)
        errors[name] = float((quantized(model)(image) - reference).norm() / reference.norm())
        print(f"{name}: relative difference with int8 weights {errors[name]:.3f}")
    same = torch.nn.Sequential(Conv2dSame(3, 8, 3, stride=2)).eval()
    before, after = tuple(same(image).shape), tuple(quantized(same)(image).shape)
    print("Conv2dSame, stride 2: output", before, "before,", after, "after")
if errors["nf_regnet_b0"] < 0.3 and before == after:
    sys.exit("Changed: special convolutions keep their behaviour.")
EOF
venv/bin/python check.py
