#!/usr/bin/env bash
# pnnx does not convert torch.addcmul and writes Python that does not parse.
#
# Versions: pnnx 20261020, torch 2.13.0
# Expected: x + x * y and torch.addcmul(x, x, y) are converted alike, or the conversion raises an error that names the operator.
# Observed: x + x * y works. For addcmul the command that runs the conversion succeeds, the generated Python file holds the line
#   `aten::addcmul(...)`, and pnnx.export then raises SyntaxError on importing its own file.
# Output:
#   plain: converted
#     ncnn layers: ['Input', 'Split', 'Input', 'BinaryOp', 'BinaryOp']
#   fused: SyntaxError, invalid syntax: v_3 = aten::addcmul(v_0, v_0, v_1, v_2)
#     ncnn layers: ['Input', 'Split', 'Input', 'pnnx.Expression', 'aten::addcmul']
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: models with addcmul. Remedy: write the product and the sum.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 pnnx==20261020 numpy==2.4.6

cat > check.py <<'EOF'
import os
import sys
from pathlib import Path

import pnnx
import torch


class Fused(torch.nn.Module):
    def forward(self, x, y):
        return torch.addcmul(x, x, y)


class Plain(torch.nn.Module):
    def forward(self, x, y):
        return x + x * y


sys.path.insert(0, os.getcwd())
inputs, result = (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)), {}
for model in (Plain(), Fused()):
    name = type(model).__name__.lower()
    try:
        pnnx.export(model, f"{name}.pt", inputs)
        result[name] = "converted"
    except SyntaxError as error:
        result[name] = f"SyntaxError, {error.msg}: {error.text.strip()}"
for name, text in result.items():
    print(f"{name}: {text}")
    print("  ncnn layers:", [line.split()[0] for line in Path(f"{name}.ncnn.param").read_text().splitlines()[2:]])
if result["fused"] == "converted":
    sys.exit("Changed: pnnx converts addcmul.")
EOF
venv/bin/python check.py
