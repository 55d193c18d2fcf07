"""Export to ncnn."""
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Dict

import torch
import torch.nn as nn

from ..layers.pyramid_formulas import fixed_sizes
from ..layers.torchscript import trace
from .format import Format, Runner

__all__ = ['FORMAT']


def _write(model: nn.Module, path: Path, example: torch.Tensor, axes: Dict[int, str], half: bool) -> None:
    import pnnx

    if len(example) != 1:
        raise ValueError(f'ncnn computes one image at a time, got batch_size={len(example)}. Use batch_size=1')
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), fixed_sizes():
        warnings.simplefilter('ignore')
        traced = Path(folder, 'model.pt')
        trace(model, example).save(traced)
        shape = ','.join(map(str, example.shape))
        # weights stay in float32
        done = subprocess.run(
            [pnnx.EXEC_PATH, str(traced), f'inputshape=[{shape}]f32', 'fp16=0', f'ncnnparam={path}',
             f'ncnnbin={path.with_suffix(".bin")}', f'ncnnpy={Path(folder, "ncnn.py")}'],
            capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f'pnnx failed with exit code {done.returncode}: {done.stderr[-500:]}')


# by default, ncnn rounds feature maps to 16 bits where the processor can
OPTIONS = dict.fromkeys(('use_fp16_packed', 'use_fp16_storage', 'use_fp16_arithmetic', 'use_bf16_storage'), False)


def _run(path: Path) -> Runner:
    import ncnn

    network = ncnn.Net()
    for name, value in OPTIONS.items():
        setattr(network.opt, name, value)
    if network.load_param(str(path)) or network.load_model(str(path.with_suffix('.bin'))):
        raise RuntimeError('ncnn cannot load the file, e.g. because it has unknown layers')

    def run(x: torch.Tensor) -> torch.Tensor:
        extractor = network.create_extractor()
        extractor.input('in0', ncnn.Mat(x[0].numpy()).clone())
        failed, output = extractor.extract('out0')
        if failed:
            raise RuntimeError(f'ncnn failed with code {failed}')
        return torch.from_numpy(output.numpy().copy()).unsqueeze(0)

    return run


FORMAT = Format(
    '.param', 'ncnn', ('pnnx', 'ncnn'), _write, _run, companions=('.bin',), dynamic=(None,), options=OPTIONS)
