"""Hub repositories of detectors: files, model card, upload and checks."""
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._errors import TimmSpaError
from ..checkpoints.files import finish_interrupted, replacing
from ..hub.card import check_repository_name
from ..hub.facts import MissingFactsError, refuse_missing, template_written
from ..hub.markdown import paragraphs, plain, wrapped
from ..hub.publish import keep_card_yaml, refuse_foreign, refuse_secrets, without_private_paths
from ..hub.upload import CARD, Published, upload
from ..training.run_record import Run
from .checkpoint import CONFIG, WEIGHTS, load_detector
from .train import METRICS

__all__ = ['TITLES', 'check_detector', 'publish_detector', 'write_detector_repository']

TITLES = {'retinanet': 'RetinaNet', 'cascade_rcnn': 'Cascade R-CNN'}
TEMPLATE = """---
{{ card_data }}
---
# {{ title }}

{{ about }}

## Use

```bash
pip install "timm_spa[detection]"
timm-spa detect predict street.jpg --checkpoint {{ source }} --out detections
```

```python
import torch
from timm_spa.detection import load_detector, read_image

model = load_detector('{{ source }}')
image = read_image('street.jpg')
with torch.inference_mode():
    (detections,) = model([image.float() / 255])
for box, label, score in zip(detections['boxes'], detections['labels'], detections['scores']):
    print(model.categories[label]['name'], round(score.item(), 2), box.tolist())
```

Classes: {{ classes }}.
{% if training %}
## Training

{{ training }}
{% endif %}{% if limits %}
## Limits

{{ limits }}
{% endif %}"""


def write_detector_repository(
        folder: Union[str, Path],
        checkpoint: Union[str, Path],
        repo_id: Optional[str] = None,
        replace_card: bool = False,
        overwrite: bool = False,
) -> List[str]:
    """Writes the files of a Hub repository, after a check that they rebuild the detector.

    The files are model.safetensors, config.json and README.md, and args.yaml, summary.csv and card.yaml of the training
    run. The files of the run are in the folder of the checkpoint or, for `best` and `last`, in its parent folder.

    Args:
        folder: Folder to write to. Its card.yaml and other files are kept.
        checkpoint: Folder of the checkpoint.
        repo_id: Name of the repository, for the examples in the card.
        replace_card: Replace the README.md in `folder`.
        overwrite: Replace files that this package did not write.

    Returns:
        Remarks for the user.
    """
    folder, checkpoint = Path(folder), Path(checkpoint)
    finish_interrupted(folder)
    check_repository_name(repo_id)
    model = load_detector(checkpoint)
    run = Run.read(checkpoint)
    if checkpoint.resolve().name in ('best', 'last') and not run.args and not run.facts:
        run = Run.read(checkpoint.resolve().parent)
    refuse_secrets(run)
    run, notes = without_private_paths(run)
    notes.insert(0, f'Weights: {WEIGHTS} of {checkpoint}.')
    row = _row_of(run, checkpoint.resolve().name)
    if row and run.facts:
        run = dataclasses.replace(run, facts=dict(run.facts, epoch=int(row['epoch'])))
    own = refuse_foreign(folder, run, (), overwrite)
    try:
        card = _make_card(model, run, row, repo_id)
    except MissingFactsError as e:
        raise template_written(e, run.folder, run.facts) from None
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(checkpoint / name, partial / name)
        run.write(partial)
        keep_card_yaml(folder, partial)
        if own and (folder / CARD).exists() and not replace_card:
            notes.append(f'The card is {folder / CARD}, unchanged.')
            shutil.copyfile(folder / CARD, partial / CARD)
        else:
            card.save(partial / CARD)
    return notes


def publish_detector(checkpoint: Union[str, Path], repo_id: str, **kwargs: Any) -> Published:
    """Publishes a detector as one commit of a Hub repository. Further arguments are those of `upload`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, 'detector')
        notes = write_detector_repository(folder, checkpoint, repo_id)
        return upload(folder, repo_id, 'Weights of a detector', notes, **kwargs)


def check_detector(folder: Path) -> Tuple[List[str], List[str]]:
    """Checks a folder with a detector. Returns lines with the checks, and lines with the problems."""
    checked = [f'{CONFIG} and {WEIGHTS}: the detector, every tensor finite']
    try:
        model = load_detector(folder)
        with torch.inference_mode():
            (detections,) = model([torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))])
    except TimmSpaError as e:
        return checked, [str(e)]
    checked.append(f'an image: {len(detections["boxes"])} boxes')
    invalid = [key for key in ('boxes', 'scores') if not detections[key].isfinite().all()]
    return checked, [f'the {" and ".join(invalid)} detected in an image are not finite'] if invalid else []


def _row_of(run: Run, name: str) -> Optional[Mapping[str, float]]:
    """Returns the metrics of the epoch of a checkpoint."""
    if not run.summary:
        return None
    if name == 'last':
        return run.summary[-1]
    if name == 'best':
        return max(run.summary, key=lambda row: row['eval_map'])
    return run.row(run.facts.get('epoch'))


def _make_card(model: Any, run: Run, row: Optional[Mapping[str, float]], repo_id: Optional[str]) -> ModelCard:
    config, facts = model.detector_config, run.facts
    dataset: Dict[str, Any] = facts.get('dataset') or {}
    scores = {METRICS[key]: row[key] for key in METRICS if key in row} if row else {}
    missing = {} if facts.get('license') else {'license': ''}
    if scores and not dataset.get('name'):
        missing['dataset.name'] = f'AP is {scores["AP"]}'
    refuse_missing('the detector', missing)
    title = f'{TITLES[config["detector"]]} on {config["backbone"]}'
    names = [plain(str(c['name'])) for c in model.categories]
    data = ModelCardData(
        license=facts['license'],
        library_name='timm_spa',
        pipeline_tag='object-detection',
        tags=['object-detection', 'timm', 'timm_spa'],
        datasets=[dataset['id']] if dataset.get('id') else None,
        base_model=facts.get('base_model') or None,
        model_name=title if scores else None,
        eval_results=[
            EvalResult(
                task_type='object-detection', task_name='Object detection',
                dataset_type=dataset.get('id') or dataset.get('type', 'coco'), dataset_name=dataset['name'],
                dataset_split=dataset.get('split'), metric_type=name.lower(), metric_name=name, metric_value=value,
            ) for name, value in scores.items()] or None,
    )
    result = ''
    if row:
        figures = ', '.join(f'{name} {value:.1f}' for name, value in scores.items())
        result = f'{figures} on {plain(dataset["name"])}, after {row["epoch"] + 1:.0f} epochs.'
    settings = run.args.get('settings') or {}
    recipe = '\n'.join(f'- {plain(str(key))}: {plain(str(value))}' for key, value in settings.items())
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        about=paragraphs(
            f'{title}. It detects objects of {config["num_classes"]} classes in images that it resizes to '
            f'{config["min_size"]} pixels on the shorter side, at most {config["max_size"]} on the longer.', result,
            facts.get('about')),
        source=f'hf-hub:{repo_id}' if repo_id else '.',
        classes=', '.join(names[:100]) + (', ...' if len(names) > 100 else ''),
        training=paragraphs(
            *(f'```bash\n{wrapped(command)}\n```' for command in facts.get('commands') or ()), recipe,
            facts.get('training')),
        limits=paragraphs(dataset.get('note'), facts.get('limits')),
    )
