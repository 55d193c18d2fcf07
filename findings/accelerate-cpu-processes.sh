#!/usr/bin/env bash
# accelerate launch --cpu --num_processes 2 starts one process.
#
# Versions: accelerate 1.15.0, torch 2.13.0
# Expected: two processes, as asked for, or an error that says how to get them.
# Observed: one process. Its environment holds no RANK or WORLD_SIZE, and the launcher's messages do not mention the other process.
# Output:
#   process 0 of 1, WORLD_SIZE None
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, CPU)
# Affected: tests of distributed code without a GPU. Remedy: start the script with `torchrun --nproc-per-node 2`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
cat > worker.py <<'EOF'
import os

from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
print(f"process {accelerator.process_index} of {accelerator.num_processes}, WORLD_SIZE {os.environ.get('WORLD_SIZE')}")
EOF
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.4.6

cat > check.py <<'EOF'
import sys
from pathlib import Path

text = Path("seen.txt").read_text()
print(text, end="")
if text.count("process ") != 1:
    sys.exit("Changed: the number of processes is no longer one.")
EOF
venv/bin/accelerate launch --cpu --num_processes 2 worker.py > seen.txt
venv/bin/python check.py
