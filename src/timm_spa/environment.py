"""Hardware and versions, recorded with every measurement."""
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

__all__ = ['environment', 'hardware']


def hardware(device: Optional[str] = None) -> str:
    """Returns the names of the GPUs, or the name of the CPU with its number of threads.

    Args:
        device: Device to describe, e.g. 'cuda:0' or 'cpu'. CUDA is not initialized for 'cpu'. Defaults to all GPUs, or
            to the CPU on a machine without a GPU.
    """
    if device is not None and device != 'cpu':
        return f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}'
    if device is None and torch.cuda.is_available():
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    name = platform.processor() or platform.machine()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        pass
    return f'CPU, {torch.get_num_threads()} of {os.cpu_count()} threads, {name}'


def environment(packages: Sequence[str], device: Optional[str] = None) -> Dict[str, Any]:
    """Returns 'hardware', the 'python' version, and the 'versions' of the given packages."""
    return dict(
        hardware=hardware(device), python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages})
