"""Tensors by name, compared, and their names in messages."""
from typing import List, Mapping

import torch

__all__ = ['compare_tensors', 'first_few']


def compare_tensors(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """Says what is missing, unexpected, or of another shape or kind, with the names; empty if nothing is."""
    both = [(name, tensor, own[name]) for name, tensor in given.items() if name in own]
    problems = {
        'missing': [name for name in own if name not in given],
        'unexpected': [name for name in given if name not in own],
        'of the wrong shape': [
            f'{name} {tuple(tensor.shape)}, expected {tuple(expected.shape)}'
            for name, tensor, expected in both if tensor.shape != expected.shape],
        'of the wrong kind': [
            f'{name} {tensor.dtype}, expected {expected.dtype}'
            for name, tensor, expected in both if tensor.is_floating_point() != expected.is_floating_point()],
    }
    return '; '.join(f'{len(names)} {what}: {first_few(names)}' for what, names in problems.items() if names)


def first_few(names: List[str], limit: int = 6) -> str:
    """Lists names for a message, the first few if there are many."""
    shown = ', '.join(names[:limit])
    return f'{shown} and {len(names) - limit} more' if len(names) > limit else shown
