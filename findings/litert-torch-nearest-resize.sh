#!/usr/bin/env bash
# litert-torch converts mode='nearest' with the indices of mode='nearest-exact'.
#
# Versions: litert-torch 0.10.0, torch 2.13.0
# Expected: F.interpolate(mode='nearest') takes index floor(i * input / output), before and after conversion.
# Observed: the converted model takes floor((i + 0.5) * input / output), as mode='nearest-exact' does. The two agree when the
#   output is a whole multiple of the input, so 4 -> 8 is right. 4 -> 7 and 7 -> 4 are wrong, without a warning.
# Output:
#   4 -> 8
#     torch nearest        [0, 0, 1, 1, 2, 2, 3, 3]
#     torch nearest-exact  [0, 0, 1, 1, 2, 2, 3, 3]
#     converted nearest    [0, 0, 1, 1, 2, 2, 3, 3]
#   4 -> 7
#     torch nearest        [0, 0, 1, 1, 2, 2, 3]
#     torch nearest-exact  [0, 0, 1, 2, 2, 3, 3]
#     converted nearest    [0, 0, 1, 2, 2, 3, 3]
#   7 -> 4
#     torch nearest        [0, 1, 3, 5]
#     torch nearest-exact  [0, 2, 4, 6]
#     converted nearest    [0, 2, 4, 6]
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: models that resize by factors that are not whole, e.g. feature pyramids at odd sizes. Remedy: gather rows and columns with indices.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 litert-torch==0.10.0

cat > check.py <<'EOF'
import sys

import litert_torch
import numpy as np
import torch
import torch.nn.functional as F


class Resize(torch.nn.Module):
    def __init__(self, size, mode):
        super().__init__()
        self.size, self.mode = size, mode

    def forward(self, x):
        return F.interpolate(x, size=(self.size, self.size), mode=self.mode)


wrong = 0
for size_in, size_out in ((4, 8), (4, 7), (7, 4)):
    x = torch.arange(float(size_in)).expand(1, 1, size_in, size_in).contiguous()
    nearest, exact = (Resize(size_out, mode).eval() for mode in ("nearest", "nearest-exact"))
    rows = [nearest(x)[0, 0, 0].tolist(), exact(x)[0, 0, 0].tolist()]
    rows.append(np.asarray(litert_torch.convert(nearest, (x,))(x.numpy()))[0, 0, 0].tolist())
    print(f"{size_in} -> {size_out}")
    for label, row in zip(("torch nearest", "torch nearest-exact", "converted nearest"), rows):
        print(f"  {label:20}", [int(v) for v in row])
    wrong += rows[2] != rows[0] and rows[2] == rows[1]
if wrong != 2:
    sys.exit(f"Changed: {wrong} of 3 sizes are converted as nearest-exact, expected 2.")
EOF
venv/bin/python check.py
