"""Verification of a repository on the Hub, or of its folder before publishing."""
import dataclasses
import glob
import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import timm
import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from ..checkpoints.config_file import class_labels, config_problems
from ..checkpoints.files import ReadError, interrupted, read_text
from ..checkpoints.fit import compare_tensors
from ..checkpoints.hub_files import endpoint, without_password
from ..checkpoints.reading import CheckpointError, read_header, read_weights, value_problems
from ..checkpoints.run_arguments import as_json
from ..checkpoints.run_files import load_yaml
from ..models._builder import WEIGHTS_FILENAME
from ..models._likely_model import likely_model
from ..predict import ImageError, default_split, for_inference, labelled_batches, load_model, predict

__all__ = ['Report', 'verify']

TIMEOUT = 10  # seconds
# files that other software may unpickle
PICKLE_NAMES = re.compile(r'\.(?:bin|ckpt|joblib|pkl|pickle|pt|pth|tar|npy|npz)$', re.IGNORECASE)


@dataclasses.dataclass
class Report:
    """Result of a verification.

    Attributes:
        checked: Performed checks, one per line.
        problems: Problems, one per line; empty for a valid repository.
        accuracy: Top-1 and top-5 accuracy in percent by k, if images were given.
    """
    checked: List[str] = dataclasses.field(default_factory=list)
    problems: List[str] = dataclasses.field(default_factory=list)
    accuracy: Dict[int, float] = dataclasses.field(default_factory=dict)


def verify(
        source: Union[str, Path],
        revision: Optional[str] = None,
        images: Optional[Union[str, Path]] = None,
        split: Optional[str] = None,
        batch_size: int = 64,
        device: str = 'cpu',
        check_detector: Optional[Callable[[Path], Tuple[List[str], List[str]]]] = None,
        model_kwargs: Optional[Mapping[str, Any]] = None,
) -> Report:
    """Verifies a repository. Problems are lines of the report, never errors.

    Args:
        source: A folder, or a repository of the Hub, 'organization/name', which is downloaded to the cache.
        revision: Branch, tag or commit of the repository.
        images: Image folder to measure the accuracy on, with one folder per class.
        split: Subfolder of `images`, if there is one of this name; None for `timm_spa.predict.default_split`.
        batch_size: Images per batch.
        device: Device to measure on.
        check_detector: Returns the checks and the problems of a folder with a detector, e.g.
            `timm_spa.detection.repository.check_detector`. Without it, a detector is a problem of the report.
        model_kwargs: Arguments of the model that config.json should have. Each difference is a problem of the report.

    Returns:
        The report.
    """
    report = Report()
    if Path(source).is_file():
        report.problems.append(f'{source} is a file. Name its folder')
        return report
    if Path(source).is_dir():
        folder: Optional[Path] = Path(source)
        report.checked.append(f'{folder}: a folder, without digests to compare with')
    else:
        folder = _download(str(source).removeprefix('hf-hub:'), revision, report)
    if folder is None:
        return report
    try:
        _check_files(folder, report)
        config = _read_config(folder, report)
        if 'detector' in config:
            _check_detector(folder, check_detector, report)
            return report
        create = _check_config(config, model_kwargs or {}, report) if config else None
        model = create and _check_weights(folder, create, report)
        if model is not None:
            _check_use(folder, model, report)
            if images is not None:
                split = split or default_split(images)
                _measure(for_inference(model, device), Path(images), split, batch_size, device, report)
    except Exception as e:  # a damaged file may raise any error, and the report should name it
        report.problems.append(f'{folder} cannot be used: {type(e).__name__}: {" ".join(str(e).split())[:500]}')
    return report


def _download(repo_id: str, revision: Optional[str], report: Report) -> Optional[Path]:
    """Downloads a repository without its pickles, and compares every file with its digest on the Hub."""
    named = f'{repo_id}{f" at {revision}" if revision else ""}'
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        report.problems.append(
            f'{repo_id} is neither a folder nor the name of a repository. Expected FOLDER or ORGANIZATION/NAME')
        return None
    try:
        api = HfApi()
        info = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)  # fails early if the network is down
        names = [file.rfilename for file in info.siblings or ()]
        wanted = [name for name in names if not PICKLE_NAMES.search(name)]
        folder = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=[*map(glob.escape, wanted)]))
        compared = api.verify_repo_checksums(repo_id, revision=info.sha)
    except Exception as e:  # errors of huggingface_hub and of its HTTP library
        cause = without_password(' '.join(str(e).split()))
        report.problems.append(f'{named} cannot be downloaded from {endpoint()}: {type(e).__name__}: {cause}')
        return None
    for name in compared.missing_paths:
        report.problems.append(
            f'{name} is on the Hub, but was not downloaded. Verify again' if name in wanted else
            f'{name} has the name of a pickle, which can run code when it is opened. It was not downloaded')
    for file in compared.mismatches:
        report.problems.append(
            f'{file["path"]} is damaged: its digest is {file["actual"]} and {file["expected"]} on the Hub. Delete '
            f'{(folder / file["path"]).resolve()} and verify again')
    report.checked.append(f'{named}: {compared.checked_count} files against the digests of the Hub, commit {info.sha}')
    return folder


def _check_files(folder: Path, report: Report) -> None:
    for left in interrupted(folder):
        report.problems.append(
            f'{left.name} exists: a command was killed while it replaced files of {folder}. Run the command again')
    files = sorted(
        p for p in folder.rglob('*')
        if p.is_file() and not {'.git', '.cache'} & set(p.relative_to(folder).parts))
    for path in files:
        name = path.relative_to(folder)
        try:
            if PICKLE_NAMES.search(path.name) or _is_pickle(path):
                report.problems.append(f'{name} is a pickle, which can run code when it is opened. Remove it')
        except (OSError, zipfile.BadZipFile) as e:
            report.problems.append(f'{name} cannot be read and may be a pickle: {e}')
    report.checked.append(f'{len(files)} files: names and contents, for pickles')
    card = folder / 'README.md'
    if not card.is_file():
        report.problems.append('README.md is missing')
        return
    try:
        metadata = load_yaml(read_text(card).split('---\n')[1])
        missing = [key for key in ('license', 'library_name', 'pipeline_tag') if not metadata.get(key)]
    except (IndexError, AttributeError, ReadError, ValueError, yaml.YAMLError):
        missing = ['readable metadata']
    if missing:
        report.problems.append(f'README.md: missing {", ".join(missing)}')
    report.checked.append('README.md: metadata')


def _is_pickle(path: Path) -> bool:
    with open(path, 'rb') as f:
        head = f.read(9)
    if path.suffix == '.safetensors' and head[8:] == b'{':  # the first eight bytes are the size of the header
        return False
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:  # the opcode PROTO and a protocol number
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith('.pkl') for name in archive.namelist())
    return False


def _read_config(folder: Path, report: Report) -> Mapping[str, Any]:
    """Returns the content of config.json, empty if it does not describe a model or a detector."""
    try:
        config = json.loads(read_text(folder / 'config.json'))
    except (ReadError, ValueError, RecursionError) as e:
        report.problems.append(f'config.json cannot be read: {e}')
        return {}
    if isinstance(config, dict) and 'detector' in config:
        return config
    report.checked.append('config.json: fields and model')
    problems = config_problems(config)
    report.problems += problems
    return {} if problems else config


def _check_detector(
        folder: Path,
        check: Optional[Callable[[Path], Tuple[List[str], List[str]]]],
        report: Report,
) -> None:
    if check is None:
        report.problems.append(
            f'{folder} has a detector, which was not checked. Run `timm-spa verify`, or pass check_detector='
            'timm_spa.detection.repository.check_detector')
        return
    checked, problems = check(folder)
    report.checked += checked
    report.problems += problems


def _check_config(
        config: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
        report: Report,
) -> Optional[Callable[..., Any]]:
    """Returns a function that creates the model of config.json in eval mode, None if the model cannot be created."""
    architecture, count, cfg = config['architecture'], config['num_classes'], config['pretrained_cfg']
    model_args = dict(config.get('model_args') or {})
    if 'num_classes' in model_args:
        report.problems.append('config.json has a duplicate num_classes in model_args, which transformers refuses')
        del model_args['num_classes']
    for key, value in model_kwargs.items():
        if key not in model_args or as_json(model_args[key]) != as_json(value):
            report.problems.append(
                f'config.json should have {key}={as_json(value)} in model_args, got {as_json(model_args.get(key))}')
    model_args.update(model_kwargs)
    if cfg.get('hf_hub_filename') != WEIGHTS_FILENAME:
        report.problems.append(
            f'config.json does not set hf_hub_filename to {WEIGHTS_FILENAME}, so that timm may look for a pickle')
    if (cfg.get('num_classes') or count) != count:
        report.problems.append(f'config.json has {count} classes, but {cfg["num_classes"]} in pretrained_cfg')
    labels = class_labels(config).get('label_names')
    if labels is not None and (len(labels) != count or len(set(labels)) != count):
        report.problems.append(f'config.json has {len(set(labels))} different label_names for {count} classes')
    numbered = config.get('id2label')
    if numbered and set(numbered) != set(map(str, range(count))):
        report.problems.append(f'config.json: the keys of id2label should be the classes 0 to {count - 1}')

    def create(**kwargs: Any) -> Any:
        model: Any = timm.create_model(
            architecture, num_classes=count, pretrained_cfg_overlay=cfg, **model_args, **kwargs).eval()
        model.pretrained_cfg['label_names'] = labels  # never the labels of registered weights
        return model

    try:
        model = create(device='meta')  # takes no memory, whatever size the file asks for
    except Exception as e:  # an invalid argument may raise any error
        report.problems.append(f'{architecture} cannot be created with the arguments of config.json: {e}')
        return None
    if config.get('num_features', model.num_features) != model.num_features:
        report.problems.append(
            f'config.json has num_features {config["num_features"]}, but {architecture} has {model.num_features}')
    return create


def _check_weights(folder: Path, create: Callable[..., Any], report: Report) -> Optional[Any]:
    """Returns the model with its weights, None if the weights do not fit or are not finite."""
    model, path = create(device='meta'), folder / WEIGHTS_FILENAME
    try:
        state_dict = read_weights(path).state_dict
        metadata = read_header(path).facts
    except CheckpointError as e:
        report.problems.append(str(e))
        return None
    report.checked.append(f'{WEIGHTS_FILENAME}: metadata {metadata}')
    architecture, tag = model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag')
    name = '.'.join(filter(None, (architecture, tag)))
    if metadata.get('format') != 'pt':
        report.problems.append(
            f'{WEIGHTS_FILENAME}: missing format "pt" in the metadata, so that transformers refuses the file')
    if metadata.get('model') not in (name, architecture):
        report.problems.append(
            f'{WEIGHTS_FILENAME} names the model {metadata.get("model")}, but config.json describes {name}')
    mismatch = compare_tensors(state_dict, model.state_dict())
    if mismatch:
        report.problems.append(f'{WEIGHTS_FILENAME} does not fit {architecture}; tensors {mismatch}')
        hint = likely_model(state_dict, architecture).rstrip('.')
        report.problems += [f'{WEIGHTS_FILENAME}: {hint}'] if hint else []
    invalid = value_problems(state_dict)
    report.problems += [f'{WEIGHTS_FILENAME} has {problem}' for problem in invalid]
    report.checked.append(f'{len(state_dict)} tensors: names, shapes, data types, finite values')
    if mismatch or invalid:
        return None
    model = create()
    model.load_state_dict(state_dict, strict=True)
    return model


def _check_use(folder: Path, model: Any, report: Report) -> None:
    """Runs the model, then loads the folder as a user does and classifies an image file."""
    size = model.pretrained_cfg['input_size']
    with torch.inference_mode():
        logits = model(torch.zeros(2, *size))
    if logits.shape != (2, model.num_classes) or not logits.isfinite().all():
        report.problems.append(
            f'a forward pass of two images of {tuple(size)} returned {tuple(logits.shape)} with '
            f'{int((~logits.isfinite()).sum())} values that are not finite')
    report.checked.append(f'one forward pass of {tuple(size)}: {model.num_classes} finite values per image')
    with tempfile.TemporaryDirectory() as temporary:
        image = Path(temporary, 'image.png')
        Image.linear_gradient('L').convert('RGB').save(image)
        (prediction,) = predict(load_model(f'local-dir:{folder}'), image)
    if prediction.error:
        report.problems.append(f'an image could not be classified: {prediction.error}')
    report.checked.append('loading by timm.create_model, and classifying an image')


def _measure(model: Any, images: Path, split: str, batch_size: int, device: str, report: Report) -> None:
    """Measures the accuracy. Names of folders are matched with the labels of the configuration, if it has any."""
    try:
        loader, count = labelled_batches(model, images, split, batch_size)
    except ImageError as e:
        report.problems.append(str(e))
        return
    meters = {k: AverageMeter() for k in (1, min(5, model.num_classes))}
    with torch.inference_mode():
        for pixels, target in tqdm(loader, str(images), leave=False, disable=None):  # None: on terminals only
            values = accuracy(model(pixels.to(device)), target.to(device), topk=tuple(meters))
            for meter, value in zip(meters.values(), values, strict=True):
                meter.update(value.item(), len(target))
    report.accuracy = {k: round(meter.avg, 3) for k, meter in meters.items()}
    percentages = ', '.join(f'top-{k} {value:.3f} %' for k, value in report.accuracy.items())
    measured = images / split if (images / split).is_dir() else images
    report.checked.append(f'{count} images of {measured}: {percentages}')
