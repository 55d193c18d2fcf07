"""File from which a training of a detector resumes: weights, momentum, loss scaler and metrics."""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import safetensors
import safetensors.torch
import torch

from ..checkpoints.files import replacing
from ..checkpoints.reading import check_weights
from .backbone import DetectionError

__all__ = ['STATE', 'Row', 'TrainingState', 'read_state', 'write_state']

STATE = 'training_state.safetensors'
KEY = 'timm_spa_detection'  # of the metadata

Row = Dict[str, float]  # metrics of an epoch


class TrainingState(NamedTuple):
    """State of a training at the end of an epoch, without the weights.

    Attributes:
        rows: Metrics of each epoch.
        momentum: Momentum of each parameter, by its index in the optimizer.
        scaler: State of the loss scaler, empty without float16.
    """
    rows: List[Row]
    momentum: Dict[int, torch.Tensor]
    scaler: Dict[str, Any]


def write_state(
        path: Path,
        model: Any,
        optimizer: Any,
        scaler: Any,
        rows: Sequence[Row],
        arguments: Dict[str, Any],
) -> None:
    """Writes the state of a training.

    Args:
        path: File to write.
        model: Detector.
        optimizer: SGD.
        scaler: Loss scaler, or None.
        rows: Metrics of each epoch.
        arguments: Detector and settings. A run resumes only with the same ones.
    """
    tensors = {f'model.{name}': tensor for name, tensor in model.state_dict().items()}
    for i, state in optimizer.state_dict()['state'].items():
        if state.get('momentum_buffer') is not None:
            tensors[f'momentum.{i}'] = state['momentum_buffer']
    facts = dict(rows=list(rows), described=arguments, scaler=scaler.state_dict() if scaler is not None else {})
    with replacing(path) as partial:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial,
            metadata={KEY: json.dumps(facts)})


def read_state(path: Path, model: Any, arguments: Dict[str, Any], resume: bool) -> TrainingState:
    """Loads the weights of a run into a model, and returns the rest of its state.

    The state of a new run is returned if the file does not exist.

    Args:
        path: File of `write_state`.
        model: Detector.
        arguments: Detector and settings.
        resume: Whether an existing run may be resumed.

    Raises:
        DetectionError: A run exists and `resume` is not set, its file cannot be read, or its arguments differ.
        CheckpointError: The weights do not fit.
    """
    if not path.exists():
        return TrainingState([], {}, {})
    if not resume:
        raise DetectionError(
            f'{path.parent} contains a training run. Resume it with --resume, or name another folder.')
    try:
        with safetensors.safe_open(path, 'pt') as f:
            facts = json.loads((f.metadata() or {})[KEY])
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as e:
        raise DetectionError(
            f'{path} cannot be read as the state of a training run: {e}. Delete the file to start again.') from e
    for key, value in arguments.items():
        _check_unchanged(path.parent, key, facts['described'].get(key), value)
    weights, momentum = ({
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ('model.', 'momentum.'))
    check_weights(weights, model, path)
    return TrainingState(facts['rows'], {int(i): tensor for i, tensor in momentum.items()}, facts['scaler'])


def _check_unchanged(folder: Path, key: str, earlier: Any, now: Any) -> None:
    if earlier == now:
        return
    changed = []
    if isinstance(earlier, dict) and isinstance(now, dict):
        changed = [
            f'{name} was {earlier.get(name)!r} and is {now[name]!r}' for name in now if earlier.get(name) != now[name]]
    changes = '; '.join(changed) or f'it was {earlier!r} and is {now!r}'
    raise DetectionError(
        f'The run in {folder} cannot resume with another {key}: {changes}. Use the earlier value, or name another '
        'folder.')
