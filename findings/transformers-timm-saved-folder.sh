#!/usr/bin/env bash
# transformers cannot load a folder that timm 1.0.31 has written.
#
# Versions: timm 1.0.31, transformers 5.24.0, torch 2.14.1, torchvision 0.29.1
# Expected: `timm.models.save_for_hf` writes a folder in the layout of the Hub. TimmWrapperForImageClassification reads that layout.
# Observed: `save_for_hf` stores `num_classes` twice in config.json, at the top level and inside `model_args`. It does so for a
#   plain `create_model(name)` too. transformers passes both to `timm.create_model` and raises TypeError. timm loads the folder.
# Output:
#   num_classes: 5 model_args: {'num_classes': 5, 'in_chans': 3, 'global_pool': 'avg'}
#   timm loads the folder and returns the same logits: True
#   transformers raises TypeError: _create_timm_model_with_error_handling() got multiple values for keyword argument 'num_classes'
#   without model_args.num_classes, transformers returns the same logits: True
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: anyone who saves or pushes with timm 1.0.31 and loads with transformers. Remedy: delete `num_classes` from `model_args`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0

cat > check.py <<'EOF'
import json
import sys
from pathlib import Path

import timm
import torch
from transformers import TimmWrapperForImageClassification

torch.manual_seed(0)
model = timm.create_model("resnet10t", num_classes=5).eval()
timm.models.save_for_hf(model, "saved", safe_serialization=True)
image = torch.rand(1, 3, 64, 64)

path = Path("saved/config.json")
config = json.loads(path.read_text())
print("num_classes:", config["num_classes"], "model_args:", config.get("model_args"))

same = torch.equal(timm.create_model("local-dir:saved", pretrained=True).eval()(image), model(image))
print("timm loads the folder and returns the same logits:", same)
try:
    TimmWrapperForImageClassification.from_pretrained("saved")
except TypeError as error:
    print("transformers raises TypeError:", str(error).split(".")[-1])
else:
    sys.exit("Changed: transformers now loads the folder.")

del config["model_args"]["num_classes"]
path.write_text(json.dumps(config))
model_hf = TimmWrapperForImageClassification.from_pretrained("saved").eval()
print("without model_args.num_classes, transformers returns the same logits:", torch.equal(model_hf(image).logits, model(image)))
EOF
venv/bin/python check.py
