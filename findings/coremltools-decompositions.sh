#!/usr/bin/env bash
# coremltools recommends run_decompositions({}), which does not help; run_decompositions() does.
#
# Versions: coremltools 9.0, torch 2.13.0
# Expected: the recommendation that coremltools prints for a program of torch.export leads to a conversion.
# Observed: with an empty table the composite operator addcmul stays in the graph and coremltools does not know it. The default table
#   splits addcmul, and the same model converts.
# Output:
#   none: NotImplementedError: Conversion for models with only ATEN or EDGE dialect is supported/tested. Provided Dialect: TRAINING.
#   Run '.run_decompositions({})' on your exported PyTorch Model prior to conversion.
#   run_decompositions({}): NotImplementedError: Unsupported fx node addcmul, kind addcmul
#   run_decompositions(): converted
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: exports to Core ML. Remedy: call `run_decompositions()` without an argument.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 coremltools==9.0

cat > check.py <<'EOF'
import sys

import coremltools
import torch


class Fused(torch.nn.Module):
    def forward(self, x, y):
        return torch.addcmul(x, x, y)


inputs = (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))
program = torch.export.export(Fused().eval(), inputs)
result = {}
for label, arguments in (("none", None), ("run_decompositions({})", [{}]), ("run_decompositions()", [])):
    try:
        decomposed = program if arguments is None else program.run_decompositions(*arguments)
        coremltools.convert(decomposed, convert_to="mlprogram", skip_model_load=True)
        result[label] = "converted"
    except (NotImplementedError, ValueError) as error:
        result[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{label}: {result[label]}")
if result["run_decompositions({})"] == "converted" or result["run_decompositions()"] != "converted":
    sys.exit("Changed: see the output.")
EOF
venv/bin/python check.py
