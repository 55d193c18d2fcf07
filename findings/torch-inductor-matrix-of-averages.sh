#!/usr/bin/env bash
# torch.compile makes a broadcast product followed by a sum many times slower on a CPU.
#
# Versions: torch 2.13.0 (CPU)
# Expected: compiled code that is at least as fast as eager mode. Broadcasting, multiplying and summing is what the compiler fuses best.
# Observed: adaptive average pooling written as a sum of products with a small matrix of averages, whose entries come from comparisons of
#   indices. The compiler fuses all of it into one reduction and computes the comparisons and a division for every product. The
#   same averages of slices (narrow, mean, stack) compile to code that is faster than eager mode.
# Output:
#   products: compiled / eager time: 33 (varies, 10 and more)
#   slices: compiled / eager time: below 1
# Date: 2026-11-30 (CPython 3.11, Linux x86-64, two cores with AVX-512)
# Affected: layers that replace adaptive pooling by sums of products, e.g. to avoid operators that a compiler cannot fuse.
#   Remedy: averages of slices.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONWARNINGS=ignore TORCHINDUCTOR_CACHE_DIR="$work/cache" OMP_NUM_THREADS=2
cat > probe.py <<'EOF'
import sys
import time

import torch

CELLS = 4


def products(x):
    length = x.shape[2]
    place, cell = torch.arange(length), torch.arange(CELLS).unsqueeze(1)
    inside = torch.logical_and((place + 1) * CELLS > cell * length, place * CELLS < (cell + 1) * length).float()
    averages = inside / inside.sum(1, keepdim=True)
    x = (x.unsqueeze(3) * averages).sum(4)
    return (x.unsqueeze(2) * averages.unsqueeze(2)).sum(3)


def slices(x):
    for dim in (3, 2):
        length = x.shape[dim]
        spans = [(cell * length // CELLS, -(-(cell + 1) * length // CELLS)) for cell in range(CELLS)]
        x = torch.stack([x.narrow(dim, start, end - start).mean(dim) for start, end in spans], dim)
    return x


def seconds(function, x):
    function(x)
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        function(x)
        best = min(best, time.perf_counter() - start)
    return best


torch.set_num_threads(2)
x = torch.randn(8, 1024, 14, 14).contiguous(memory_format=torch.channels_last)
expected = torch.nn.functional.adaptive_avg_pool2d(x, CELLS)
ratios = []
for function in (products, slices):
    compiled = torch.compile(function)
    torch.testing.assert_close(compiled(x), expected)
    ratio = seconds(compiled, x) / seconds(function, x)
    ratios.append(ratio)
    print(f'{function.__name__}: compiled / eager time: {ratio:.2g}')
if not ratios[0] > 4 > 2 > ratios[1]:
    sys.exit('Changed: compiled sums of products are no longer much slower than eager mode.')
EOF
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.6
venv/bin/python probe.py
