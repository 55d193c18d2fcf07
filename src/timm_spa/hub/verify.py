"""Checks of a published repository, or of a folder that will be one."""
import dataclasses
import glob
import json
import re
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import timm
import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from ..checkpoints.config_file import class_labels, config_problems
from ..checkpoints.files import ReadError, interrupted, read_text
from ..checkpoints.fit import compare_tensors
from ..checkpoints.hub_files import endpoint, without_password
from ..checkpoints.reading import CheckpointError, read_header, read_weights, value_problems
from ..checkpoints.run_files import load_yaml
from ..models._builder import WEIGHTS_FILENAME
from ..predict import PictureError, for_inference, labelled_batches, load_model, predict

__all__ = ['Report', 'verify']

TIMEOUT = 10  # seconds
# files that unpickling software opens; a repository of safetensors needs none
PICKLE_NAMES = re.compile(r'\.(?:bin|ckpt|joblib|pkl|pickle|pt|pth|tar|npy|npz)$', re.IGNORECASE)


@dataclasses.dataclass
class Report:
    """What was checked, and what is wrong, one line each.

    Attributes:
        checked: What was looked at, found right or not.
        problems: What is wrong; empty for a sound repository.
        accuracy: Top-1 and top-5 in percent by k, if pictures were given.
    """
    checked: List[str] = dataclasses.field(default_factory=list)
    problems: List[str] = dataclasses.field(default_factory=list)
    accuracy: Dict[int, float] = dataclasses.field(default_factory=dict)


def verify(
        source: Union[str, Path],
        revision: Optional[str] = None,
        images: Optional[Union[str, Path]] = None,
        split: str = 'validation',
        batch_size: int = 64,
        device: str = 'cpu',
) -> Report:
    """Verifies a repository. Nothing that is wrong with it raises an error: it is a line of the report.

    Args:
        source: A folder, or a repository of the Hub, 'organization/name', which is downloaded to the cache.
        revision: Branch, tag or commit of the repository.
        images: Image folder to measure the accuracy on, a folder for each class.
        split: Subfolder of `images`, if there is one of this name.
        batch_size: Pictures at a time.
        device: Device to measure on.

    Returns:
        The report.
    """
    report = Report()
    if Path(source).is_file():
        report.problems.append(f'{source} is a file: name the folder that it is in')
        return report
    if Path(source).is_dir():
        folder: Optional[Path] = Path(source)
        report.checked.append(f'{folder}: a folder, its digests are compared with nothing')
    else:
        folder = _download(str(source).removeprefix('hf-hub:'), revision, report)
    if folder is None:
        return report
    try:
        from ..detection.checkpoint import is_detector  # detection builds on this package
        from ..detection.repository import check_detector

        _check_files(folder, report)
        if is_detector(folder):
            checked, problems = check_detector(folder)
            report.checked += checked
            report.problems += problems
            return report
        create = _check_config(folder, report)
        model = create and _check_weights(folder, create, report)
        if model is not None:
            _check_use(folder, model, report)
            if images is not None:
                _measure(for_inference(model, device), Path(images), split, batch_size, device, report)
    except Exception as e:  # files can be wrong in more ways than can be listed, and the report should name each
        report.problems.append(f'{folder} cannot be used: {type(e).__name__}: {" ".join(str(e).split())[:500]}')
    return report


def _download(repo_id: str, revision: Optional[str], report: Report) -> Optional[Path]:
    """Downloads a repository without its pickles, and compares every file with the digest that the Hub has of it."""
    named = f'{repo_id}{f" at {revision}" if revision else ""}'
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        report.problems.append(f'{repo_id} is no folder, and no name of a repository (organization/name)')
        return None
    try:
        api = HfApi()
        info = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)  # fails early if the network is down
        names = [file.rfilename for file in info.siblings or ()]
        wanted = [name for name in names if not PICKLE_NAMES.search(name)]
        folder = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=[*map(glob.escape, wanted)]))
        compared = api.verify_repo_checksums(repo_id, revision=info.sha)
    except Exception as e:  # huggingface_hub's, and whatever the HTTP library of the day raises
        cause = without_password(' '.join(str(e).split()))
        report.problems.append(f'{named} cannot be had from {endpoint()}: {type(e).__name__}: {cause}')
        return None
    for name in compared.missing_paths:
        report.problems.append(
            f'{name} is on the Hub and was not downloaded' if name in wanted else
            f'{name} has the name of a pickle, which can run code when it is opened; not downloaded')
    for file in compared.mismatches:
        report.problems.append(
            f'{file["path"]} has the digest {file["actual"]} here ({(folder / file["path"]).resolve()}) and '
            f'{file["expected"]} on the Hub: it is damaged; delete it and verify again')
    report.checked.append(f'{named}: {compared.checked_count} files against the digests of the Hub, commit {info.sha}')
    return folder


def _check_files(folder: Path, report: Report) -> None:
    for left in interrupted(folder):
        report.problems.append(
            f'{left.name} is there: a command was killed while it replaced files of {folder}. Run it again')
    files = sorted(
        p for p in folder.rglob('*')
        if p.is_file() and not {'.git', '.cache'} & set(p.relative_to(folder).parts))
    for path in files:
        name = path.relative_to(folder)
        try:
            if PICKLE_NAMES.search(path.name) or _is_pickle(path):
                report.problems.append(f'{name} is a pickle, which can run code when it is opened')
        except (OSError, zipfile.BadZipFile) as e:
            report.problems.append(f'{name} cannot be read: {e}. It may be a pickle')
    report.checked.append(f'{len(files)} files: none a pickle by its name or its content')
    card = folder / 'README.md'
    if not card.is_file():
        report.problems.append('there is no README.md')
        return
    try:
        metadata = load_yaml(read_text(card).split('---\n')[1])
        missing = [key for key in ('license', 'library_name', 'pipeline_tag') if not metadata.get(key)]
    except (IndexError, AttributeError, ReadError, ValueError, yaml.YAMLError):
        missing = ['metadata that can be read']
    if missing:
        report.problems.append(f'README.md lacks {", ".join(missing)}')
    report.checked.append('README.md: metadata')


def _is_pickle(path: Path) -> bool:
    with open(path, 'rb') as f:
        head = f.read(9)
    if path.suffix == '.safetensors' and head[8:] == b'{':  # behind eight bytes of any value, the size of the header
        return False
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:  # the opcode of a protocol, and its number
        return True
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith('.pkl') for name in archive.namelist())
    return False


def _check_config(folder: Path, report: Report) -> Optional[Callable[..., Any]]:
    """Returns what makes the model that config.json describes, in eval mode; None if it describes none."""
    report.checked.append('config.json: the model that it describes')
    try:
        config = json.loads(read_text(folder / 'config.json'))
    except (ReadError, ValueError, RecursionError) as e:
        report.problems.append(f'config.json cannot be read: {e}')
        return None
    problems = config_problems(config)
    if problems:
        report.problems += problems
        return None
    architecture, count, cfg = config['architecture'], config['num_classes'], config['pretrained_cfg']
    model_args = dict(config.get('model_args') or {})
    if 'num_classes' in model_args:
        report.problems.append('config.json has num_classes in model_args too, which transformers refuses')
        del model_args['num_classes']
    if cfg.get('hf_hub_filename') != WEIGHTS_FILENAME:
        report.problems.append(
            f'config.json does not set hf_hub_filename to {WEIGHTS_FILENAME}: timm may look for a pickle')
    if (cfg.get('num_classes') or count) != count:
        report.problems.append(f'config.json has {count} classes, and {cfg["num_classes"]} in pretrained_cfg')
    labels = class_labels(config).get('label_names')
    if labels is not None and (len(labels) != count or len(set(labels)) != count):
        report.problems.append(f'config.json has {len(set(labels))} label_names for {count} classes')
    numbered = config.get('id2label')
    if numbered and set(numbered) != set(map(str, range(count))):
        report.problems.append(f'config.json should have id2label for the classes 0 to {count - 1}, and has others')

    def create(**kwargs: Any) -> Any:
        model: Any = timm.create_model(
            architecture, num_classes=count, pretrained_cfg_overlay=cfg, **model_args, **kwargs).eval()
        model.pretrained_cfg['label_names'] = labels  # none are none, and not those of the registered weights
        return model

    try:
        model = create(device='meta')  # which takes no memory, whatever the file asks for
    except Exception as e:  # whatever a wrong argument makes a model raise
        report.problems.append(f'{architecture} cannot be created with the arguments of config.json: {e}')
        return None
    if config.get('num_features', model.num_features) != model.num_features:
        report.problems.append(
            f'config.json has num_features {config["num_features"]}, and {architecture} has {model.num_features}')
    return create


def _check_weights(folder: Path, create: Callable[..., Any], report: Report) -> Optional[Any]:
    """Returns the model with its weights, None if they do not fit or are no numbers."""
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
        report.problems.append(f'{WEIGHTS_FILENAME} does not say that it is of torch: transformers refuses it')
    if metadata.get('model') not in (name, architecture):
        report.problems.append(f'{WEIGHTS_FILENAME} is of model {metadata.get("model")}, and config.json of {name}')
    misfit = compare_tensors(state_dict, model.state_dict())
    if misfit:
        report.problems.append(f'{WEIGHTS_FILENAME} does not fit {architecture}; tensors {misfit}')
    odd = value_problems(state_dict)
    report.problems += [f'{WEIGHTS_FILENAME} has {problem}' for problem in odd]
    report.checked.append(f'{len(state_dict)} tensors: names, shapes, kinds, every value finite')
    if misfit or odd:
        return None
    model = create()
    model.load_state_dict(state_dict, strict=True)
    return model


def _check_use(folder: Path, model: Any, report: Report) -> None:
    """Runs the model, and loads the folder once more as a user does, to classify a photograph."""
    size = model.pretrained_cfg['input_size']
    with torch.inference_mode():
        logits = model(torch.zeros(2, *size))
    if logits.shape != (2, model.num_classes) or not logits.isfinite().all():
        report.problems.append(
            f'a forward pass of {tuple(size)} gave {tuple(logits.shape)}, '
            f'{int((~logits.isfinite()).sum())} values of it not finite')
    report.checked.append(f'one forward pass of {tuple(size)}: {model.num_classes} finite values a picture')
    photograph = resources.files(__package__.partition('.')[0]) / 'images' / 'Red-Beet.jpg'
    (answer,) = predict(load_model(f'local-dir:{folder}'), [str(photograph)])
    if answer.error:
        report.problems.append(f'a photograph could not be classified: {answer.error}')
    report.checked.append('loaded by timm.create_model, a photograph classified')


def _measure(model: Any, images: Path, split: str, batch_size: int, device: str, report: Report) -> None:
    """Measures the accuracy; the folders' names are matched with the labels of the configuration, if it has any."""
    try:
        loader, count = labelled_batches(model, images, split, batch_size)
    except PictureError as e:
        report.problems.append(str(e))
        return
    meters = {k: AverageMeter() for k in (1, min(5, model.num_classes))}
    with torch.inference_mode():
        for pixels, target in tqdm(loader, str(images), leave=False, disable=None):  # None: on terminals only
            values = accuracy(model(pixels.to(device)), target.to(device), topk=tuple(meters))
            for meter, value in zip(meters.values(), values, strict=True):
                meter.update(value.item(), len(target))
    report.accuracy = {k: round(meter.avg, 3) for k, meter in meters.items()}
    said = ', '.join(f'top-{k} {value:.3f} %' for k, value in report.accuracy.items())
    report.checked.append(f'{count} pictures of {images}: {said}')
