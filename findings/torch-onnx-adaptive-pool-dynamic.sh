#!/usr/bin/env bash
# The ONNX exporter turns adaptive pooling with dynamic height and width into average pooling with the example's kernel.
#
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0
# Expected: adaptive_avg_pool2d(x, 3) exported with dynamic height and width returns 3x3 for every size, or the export raises an error.
# Observed: the export succeeds without a warning. The graph holds an average pooling whose kernel fits the example. At other sizes even
#   the shape is wrong: 18 x 24 becomes 4 x 6 in place of 3 x 3.
# Output:
#   input [1, 2, 'height', 'width'] output [1, 2, '(height//4)', '(width//4)']
#   (1, 2, 12, 12): torch (1, 2, 3, 3), ONNX (1, 2, 3, 3), equal
#   (1, 2, 18, 24): torch (1, 2, 3, 3), ONNX (1, 2, 4, 6), different
#   (1, 2, 15, 20): torch (1, 2, 3, 3), ONNX (1, 2, 3, 5), different
#   torch.export alone at 18 x 24: (1, 2, 3, 3)
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: models with adaptive pooling to more than 1x1 and exports with dynamic sizes. Remedy: pool with averaging matrices built from
#   the symbolic size, or export one file per size.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6

cat > check.py <<'EOF'
import sys

import onnxruntime
import torch
import torch.nn.functional as F


class Pool(torch.nn.Module):
    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 3)


model, example = Pool().eval(), torch.rand(1, 2, 12, 12)
height, width = torch.export.Dim("height", min=4, max=64), torch.export.Dim("width", min=4, max=64)
torch.onnx.export(
    model, (example,), "pool.onnx", dynamo=True, dynamic_shapes={"x": {2: height, 3: width}}, verbose=False)

session = onnxruntime.InferenceSession("pool.onnx")
print("input", session.get_inputs()[0].shape, "output", session.get_outputs()[0].shape)
wrong = 0
for shape in ((1, 2, 12, 12), (1, 2, 18, 24), (1, 2, 15, 20)):
    x = torch.rand(shape)
    expected = model(x)
    result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    equal = result.shape == expected.shape and torch.allclose(result, expected, atol=1e-6)
    print(f"{shape}: torch {tuple(expected.shape)}, ONNX {tuple(result.shape)}, {'equal' if equal else 'different'}")
    wrong += not equal
program = torch.export.export(model, (example,), dynamic_shapes={"x": {2: height, 3: width}})
print("torch.export alone at 18 x 24:", tuple(program.module()(torch.rand(1, 2, 18, 24)).shape))
if wrong == 0:
    sys.exit("Changed: the exported model pools to 3x3 at every size.")
EOF
venv/bin/python check.py
