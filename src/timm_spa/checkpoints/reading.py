"""Read weight files without running code from them, and check them against a model."""
import argparse
import dataclasses
import errno
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Union

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from huggingface_hub.utils.sha import sha_fileobj
from timm.models import clean_state_dict, is_model

from .._errors import TimmSpaError
from .fit import compare_tensors, first_few

__all__ = [
    'CheckpointError', 'Header', 'Weights', 'check_shapes', 'check_weights', 'no_hint', 'read_checkpoint',
    'read_header', 'read_weights', 'stored_epoch', 'value_problems', 'write_tensors']

# entries of a training checkpoint that hold weights, in the order of preference
_STATE_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


class CheckpointError(TimmSpaError, ValueError):
    """A file cannot be read as weights, or its weights do not fit. The message names the file and the cause."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a file, with the file's record of their training.

    Attributes:
        state_dict: Tensors by name.
        used: Entry of the file: 'state_dict_ema' or 'model_ema' (averaged over training steps), 'state_dict',
            'model', or '' for a file that contains tensors only.
        path: The file.
        source_sha256: Digest of the file that a published or converted file was made from.
        arch: Name of the trained model, if recorded.
        epoch: Epoch of the weights, if recorded.
        args: Arguments of the training, if recorded.
        model_args: Arguments of the model except the number of classes, if recorded by `publish` or `convert`.
        converted_from: Kind of the source, if `convert` made the file.
    """
    state_dict: Dict[str, torch.Tensor]
    used: str
    path: Path
    source_sha256: Optional[str] = None
    arch: Optional[str] = None
    epoch: Optional[int] = None
    args: Dict[str, Any] = dataclasses.field(default_factory=dict)
    model_args: Optional[Dict[str, Any]] = None
    converted_from: Optional[str] = None

    @property
    def sha256(self) -> str:
        """Digest of the file that the weights come from; reads the whole file if it is not recorded."""
        if self.source_sha256:
            return self.source_sha256
        with open(self.path, 'rb') as f:
            return sha_fileobj(f).hex()


def read_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Reads a checkpoint file without running code from it.

    Args:
        path: A safetensors file, or one that `torch.save` wrote, e.g. timm's `model_best.pth.tar`.

    Returns:
        The content: tensors by name, or the entries of a training checkpoint.

    Raises:
        CheckpointError: The file cannot be read as weights. The message describes the file.
    """
    path = Path(path)
    try:
        if not os.path.lexists(path):
            raise CheckpointError(f'{path} does not exist.')
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f'{path} cannot be read as weights: it is not a regular file.')
        head = _head(path)
        if _is_safetensors(path, head):
            return safetensors.torch.load_file(path)
        # timm's training checkpoints store their arguments in this class, which runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except Exception as e:  # every reader raises its own errors
        raise CheckpointError(f'{path} cannot be read as weights: {_what_it_is(path, e)}') from e
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{path} cannot be read as weights: expected a dictionary, got a {type(content).__name__}.')
    return dict(content)


def read_weights(path: Union[str, Path]) -> Weights:
    """Reads the weights of a checkpoint file without running code from it.

    Args:
        path: A training checkpoint of timm, a file of a state dict, or a safetensors file.

    Returns:
        The weights, those averaged over training steps if there are any; without the 'module.' and '_orig_mod.' of a
        wrapped model before each name.

    Raises:
        CheckpointError: The file cannot be read as weights.
    """
    content = read_checkpoint(path)
    used = next((key for key in _STATE_KEYS if isinstance(content.get(key), Mapping) and content[key]), '')
    state_dict = content[used] if used else content
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state_dict.items()):
        raise CheckpointError(
            f'{path} does not contain weights: {", ".join(_STATE_KEYS)} are missing, and its entries '
            f'({first_few([str(k) for k in content])}) are not all tensors.')
    if not state_dict:
        raise CheckpointError(f'{path} does not contain weights: it is readable but empty.')
    unsupported = [
        name for name, t in state_dict.items() if t.layout != torch.strided or t.is_meta or _is_tiny_float(t)]
    if unsupported:
        raise CheckpointError(
            f'{path} has unsupported tensors: {first_few(unsupported)}. They are sparse, on the meta device, or of an '
            '8-bit floating-point type. Save them as dense float16 or float32.')
    about: Mapping[str, Any] = content if used else _published_facts(Path(path))
    args, arch, epoch = about.get('args'), about.get('arch'), about.get('epoch')
    return Weights(
        state_dict=clean_state_dict(dict(state_dict)),
        used=used,
        path=Path(path),
        source_sha256=about.get('source_sha256'),
        # timm writes the name of the class if it has no arguments
        arch=arch if isinstance(arch, str) and is_model(arch.partition('.')[0]) else None,
        epoch=epoch if isinstance(epoch, int) else None,
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
        model_args=about.get('model_args') if not used else None,
        converted_from=about.get('converted_from') if not used else None,
    )


def _is_tiny_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def _published_facts(path: Path) -> Dict[str, Any]:
    """Reads the record of `publish` or `convert` in a safetensors file. Publishing it again then changes nothing."""
    facts = read_header(path).facts if _is_safetensors(path, _head(path)) else {}
    if 'model' not in facts:
        return {}
    try:
        kwargs = json.loads(facts['model_args'])
    except (KeyError, ValueError, RecursionError):
        kwargs = None
    return dict(
        facts, epoch=stored_epoch(facts), arch=facts['model'].partition('.')[0],
        model_args=kwargs if isinstance(kwargs, dict) else None)


@dataclasses.dataclass(frozen=True)
class Header:
    """Header of a safetensors file.

    Attributes:
        facts: Metadata, text by name.
        dtypes: Types of the tensors in the notation of the format, e.g. 'F32'.
    """
    facts: Dict[str, str]
    dtypes: FrozenSet[str]


def read_header(path: Union[str, Path]) -> Header:
    """Reads the header of a safetensors file."""
    try:
        with safetensors.safe_open(path, framework='pt') as f:
            names = list(f.keys())  # noqa: SIM118  no mapping
            return Header(f.metadata() or {}, frozenset(f.get_slice(name).get_dtype() for name in names))
    except Exception as e:  # safetensors has its own error, and hands on those of the file system
        raise CheckpointError(f'{path} cannot be read as weights: {_what_it_is(Path(path), e)}') from e


def stored_epoch(facts: Mapping[str, str]) -> Optional[int]:
    """Returns the epoch in the metadata of a published file, None if it is missing."""
    epoch = facts.get('epoch', '')
    return int(epoch) if re.fullmatch('[0-9]{1,9}', epoch) else None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file: the same tensors and metadata give the same bytes.

    Args:
        path: File to write, not atomically: `replacing` gives a path for that.
        tensors: Tensors by name.
        metadata: Texts by name.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors' is for the owner alone
    # safetensors refuses tensors that share memory
    copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
              for name, tensor in tensors.items()}
    safetensors.torch.save_file(copies, path, metadata=dict(metadata))
    path.chmod(mode)
    del copies
    # safetensors writes metadata in an order that changes from run to run
    with open(path, 'r+b') as f:
        size = int.from_bytes(f.read(8), 'little')
        header = json.loads(f.read(size))
        header['__metadata__'] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
        if len(text) > size:  # would replace the beginning of the first tensor
            values = f.read()
            size = -(-len(text) // 8) * 8  # tensors are aligned
            f.seek(0)
            f.write(size.to_bytes(8, 'little') + text.ljust(size) + values)
        else:
            f.seek(8)
            f.write(text.ljust(size))


def no_hint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Returns an empty text: nothing is known about the model of tensors."""
    return ''


def check_weights(
        state_dict: Mapping[str, torch.Tensor],
        model: nn.Module,
        source: Union[str, Path],
        hint: Callable[[Mapping[str, torch.Tensor]], str] = no_hint,
) -> None:
    """Checks every tensor and loads the weights into a model, strictly.

    Args:
        state_dict: Tensors by name.
        model: Model that is given the weights.
        source: File or repository of the weights, for the message.
        hint: Returns a sentence about the model that the tensors are of.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape or kind, or not finite; a variance
            is negative; or the number of classes differs.
    """
    check_shapes(state_dict, model, source, hint)
    for problem in value_problems(state_dict):
        raise CheckpointError(f'{source} has {problem}.')
    model.load_state_dict(dict(state_dict), strict=True)


def value_problems(state_dict: Mapping[str, torch.Tensor]) -> List[str]:
    """Returns descriptions of invalid values: values that are not finite, and negative variances."""
    infinite = [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]
    negative = [name for name, t in state_dict.items() if name.endswith('running_var') and bool((t < 0).any())]
    problems = []
    if infinite:
        problems.append(
            f'{len(infinite)} tensors with values that are not finite: {first_few(infinite)} (the training diverged; '
            'take an earlier checkpoint)')
    if negative:
        problems.append(f'{len(negative)} negative variances: {first_few(negative)} (the file is damaged)')
    return problems


def check_shapes(
        state_dict: Mapping[str, torch.Tensor],
        model: nn.Module,
        source: Union[str, Path],
        hint: Callable[[Mapping[str, torch.Tensor]], str] = no_hint,
) -> None:
    """Checks names, shapes, kinds and number of classes of weights. The model may be on the meta device."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    classifier = f'{cfg.get("classifier")}.weight'
    own = model.state_dict()
    given = state_dict.get(classifier)
    if classifier in own and given is not None and given.ndim and len(given) != len(own[classifier]):
        raise CheckpointError(
            f'{source} has {len(given)} classes ({classifier}), but the model has {len(own[classifier])}. Set '
            '--num-classes, or choose another model.')
    misfit = compare_tensors(state_dict, own)
    if misfit:
        raise CheckpointError(
            f'{source} does not fit {type(model).__name__}; tensors {misfit}. ' + (
                hint(state_dict) or 'Choose the model and the arguments that it was trained with.'))


def _head(path: Path) -> bytes:
    with open(path, 'rb') as f:
        return f.read(256)


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == '.safetensors' or head[8:10] == b'{"'


def _what_it_is(path: Path, error: Exception) -> str:
    if path.is_dir():
        return 'it is a folder. Give the path of the file in it.'
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:  # torch's, for a truncated file
        return f'{error.strerror}.'
    head, size = _head(path), path.stat().st_size
    if not size:
        return 'it is empty. Copy or download it again.'
    if head.startswith(b'version https://git-lfs'):
        return 'it is a Git LFS pointer. Fetch the file with `git lfs pull`.'
    if re.match(rb'\s*<(!doctype|html|\?xml)', head, re.IGNORECASE):
        return 'it is a web page, e.g. an error page of a server. Download it again.'
    if _is_safetensors(path, head):
        missing = _missing_bytes(path, size)
        return (
            f'it is a truncated safetensors file, {missing} bytes are missing. Copy or download it again.' if missing
            else f'it is not a safetensors file, although its name ends so ({error}).')
    if head.lstrip().startswith(b'{') and b'"weight_map"' in path.read_bytes()[:10_000_000]:
        return 'it is the index of weights in several files. Merge these files into one first.'
    blocked = re.search(r'GLOBAL ([\w.]+)', str(error))
    if blocked or re.match(rb'c[\w.]+\n\w|\((?:[dil]p?\d*\n?|c[\w.]+\n)|[\]}]\.?$|[\x80][\x01-\x05]', head):
        wants = f' that imports {blocked[1]}' if blocked else ''
        return (
            f'it is a pickle{wants}, which can run any code. Ask its author for a safetensors file.')
    if head.startswith(b'PK') and not zipfile.is_zipfile(path):
        return 'it is a truncated file of torch.save. Copy or download it again.'
    return (
        f'it is neither a safetensors file nor a file of torch.save with tensors and plain values only '
        f'({type(error).__name__}).')


def _missing_bytes(path: Path, size: int) -> int:
    """Returns the number of missing bytes by the header of a safetensors file, 0 if the header is unreadable."""
    with open(path, 'rb') as f:
        header_size = int.from_bytes(f.read(8), 'little')
        if size < 8 or header_size > 100_000_000:  # the limit of the format
            return 8 - size if size < 8 else 0
        header = f.read(header_size)
    if len(header) < header_size:
        return header_size - len(header)
    try:
        ends = [entry['data_offsets'][1] for name, entry in json.loads(header).items() if name != '__metadata__']
        return max(0, 8 + header_size + max(ends, default=0) - size)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
