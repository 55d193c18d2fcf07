"""Comparison of tensors by name, and their names in messages."""
import dataclasses
from typing import List, Mapping

import torch

__all__ = ['Mismatch', 'compare_tensors', 'first_few']


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """Differences between the tensors of a file and those of a model. False if there are none.

    Attributes:
        missing: Names that only the model has.
        unexpected: Names that only the file has.
        shapes: Names with both shapes, where the shapes differ.
        kinds: Names with both types, where one is floating-point and the other is not.
    """
    missing: List[str]
    unexpected: List[str]
    shapes: List[str]
    kinds: List[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes) + len(self.kinds)

    def __str__(self) -> str:
        problems = {
            'missing': self.missing, 'unexpected': self.unexpected, 'of the wrong shape': self.shapes,
            'of the wrong kind': self.kinds}
        return '; '.join(f'{len(names)} {what}: {first_few(names)}' for what, names in problems.items() if names)


def compare_tensors(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> Mismatch:
    """Compares names, shapes and kinds of the tensors of a file, `given`, with those of a model, `own`."""
    both = [(name, tensor, own[name]) for name, tensor in given.items() if name in own]
    return Mismatch(
        missing=[name for name in own if name not in given],
        unexpected=[name for name in given if name not in own],
        shapes=[
            f'{name} {tuple(tensor.shape)}, expected {tuple(expected.shape)}'
            for name, tensor, expected in both if tensor.shape != expected.shape],
        kinds=[
            f'{name} {tensor.dtype}, expected {expected.dtype}'
            for name, tensor, expected in both if tensor.is_floating_point() != expected.is_floating_point()],
    )


def first_few(names: List[str], limit: int = 6) -> str:
    """Lists names for a message, the first few if there are many."""
    shown = ', '.join(names[:limit])
    return f'{shown} and {len(names) - limit} more' if len(names) > limit else shown
