"""What a measured number depends on beside its arguments: hardware and versions."""
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

__all__ = ['environment', 'hardware']


def hardware(device: Optional[str] = None) -> str:
    """Names what torch computes on: accelerators, or the processor with the threads that torch uses.

    With a device that one and the version of CUDA, else all of the machine. With 'cpu', CUDA is not asked for anything.
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
    """Collects the texts 'hardware' and 'python', and 'versions' of distributions by name."""
    return dict(
        hardware=hardware(device), python=platform.python_version(),
        versions={name: metadata.version(name) for name in packages})
