"""Training of detectors on accelerate: one process, several GPUs, or the CPU.

A run writes into its folder:

- `training_state.safetensors`: weights, momentum and the metrics so far, in one file, so that a run that was killed at
  any moment goes on from the end of an epoch and ends as if it had not been.
- `last/` and `best/`: checkpoints of the last epoch and of the one with the highest AP, see `load_detector`.
- `summary.csv`: metrics of each epoch, in the layout of timm's.
- `args.yaml`: the detector and the settings.
"""
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import safetensors
import safetensors.torch
import torch
import yaml
from timm.utils import distribute_bn
from torch.utils.data import DataLoader

from ..checkpoints.files import replacing
from ..checkpoints.reading import check_weights
from ..training.guard import TrainingError
from ..training.log import write_summary
from .arguments import check_config
from .backbone import DetectionError
from .checkpoint import save_detector
from .data import CocoDataset, Mirrored, collate, read_batches
from .evaluate import check_evaluable, coco_figures, detect
from .models import check_image_size

__all__ = ['BASE_RATES', 'Settings', 'learning_rate', 'train']

BASE_RATES = {'retinanet': 0.01, 'cascade_rcnn': 0.02}  # of the paper, for BASE_BATCH images a step
BASE_BATCH = 16
WARMUP_STEPS = 500
WARMUP_START = 0.001  # part of the learning rate
STATE = 'training_state.safetensors'
SUMMARY = 'summary.csv'
OWNER = 'timm_spa_training'  # attribute of accelerate's state, if a training here made it
METRICS = {'eval_map': 'AP', 'eval_ap50': 'AP50', 'eval_ap75': 'AP75'}

Row = Dict[str, float]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train; what is not given is the recipe of the paper's table VI.

    Attributes:
        epochs: Number of epochs.
        batch_size: Images a step of each process.
        lr: Learning rate; if None the paper's, scaled linearly to the images a step of all processes.
        decay_epochs: Epochs after which it is divided by 10; if None, 18 and 22 of 24, and in proportion.
        warmup_steps: Steps in which it grows from nothing; if None 500, but no more than the first epoch.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of every parameter.
        clip_grad: Largest norm of the gradient; unlimited if None.
        mixed_precision: 'no', 'bf16' or 'fp16'.
        flip: Mirror half of the images.
        seed: Seed of the order of the images, of what is mirrored and of the boxes drawn to learn from.
    """
    epochs: int = 24
    batch_size: int = 2
    lr: Optional[float] = None
    decay_epochs: Optional[Tuple[int, ...]] = None
    warmup_steps: Optional[int] = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_grad: Optional[float] = None
    mixed_precision: str = 'no'
    flip: bool = True
    seed: int = 42

    def completed(self, detector: str, images: int, processes: int) -> 'Settings':
        """Fills in what depends on detector, dataset and number of processes."""
        def expect(right: bool, name: str, expected: str) -> None:
            if not right:
                raise DetectionError(f'{name} must be {expected}, got {getattr(self, name)!r}.')

        for name, smallest, largest in (
                ('seed', 0, 2 ** 32 - 1), ('epochs', 1, math.inf), ('batch_size', 1, math.inf),
                ('warmup_steps', 0, math.inf)):
            value = getattr(self, name)
            right = type(value) is int and smallest <= value <= largest
            limit = f' to {largest}' if largest < math.inf else ''
            expect(right or (name == 'warmup_steps' and value is None), name, f'a whole number from {smallest}{limit}')
        for name in ('lr', 'clip_grad'):
            value = getattr(self, name)
            expect(value is None or (_is_number(value) and value > 0), name, 'a number above 0')
        expect(_is_number(self.momentum) and 0 <= self.momentum < 1, 'momentum', 'a number from 0 to below 1')
        expect(_is_number(self.weight_decay) and self.weight_decay >= 0, 'weight_decay', 'a number from 0')
        expect(isinstance(self.flip, bool), 'flip', 'True or False')
        decays = self.decay_epochs
        expect(
            decays is None or isinstance(decays, (list, tuple)) and all(type(epoch) is int for epoch in decays),
            'decay_epochs', 'a sequence of whole numbers')
        rate = BASE_RATES[detector] * self.batch_size * processes / BASE_BATCH
        decay = (round(self.epochs * 18 / 24), round(self.epochs * 22 / 24))
        steps = math.ceil(math.ceil(images / processes) / self.batch_size)
        return dataclasses.replace(
            self,
            lr=rate if self.lr is None else self.lr,
            decay_epochs=decay if self.decay_epochs is None else tuple(self.decay_epochs),
            warmup_steps=min(WARMUP_STEPS, steps) if self.warmup_steps is None else self.warmup_steps,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def learning_rate(settings: Settings, epoch: int, step: int) -> float:
    """Returns the learning rate of a step.

    Args:
        settings: Settings, completed.
        epoch: Epoch, from 0.
        step: Step, from 0 and from the start of training.
    """
    assert settings.lr is not None
    assert settings.decay_epochs is not None
    rate = settings.lr * 0.1 ** sum(epoch >= decay for decay in settings.decay_epochs)
    if settings.warmup_steps and step < settings.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / settings.warmup_steps
    return rate


def train(
        model: Any,
        train_set: CocoDataset,
        val_set: CocoDataset,
        output: Union[str, Path],
        settings: Optional[Settings] = None,
        resume: bool = False,
        cpu: bool = False,
        workers: int = 0,
        log: Callable[[str], None] = print,
        progress: Optional[Callable[[str], None]] = None,
) -> List[Row]:
    """Trains a detector.

    Args:
        model: Detector of `retinanet` or `cascade_rcnn`, with as many classes as `train_set` has categories.
        train_set: Images to learn from. It is not changed: images are mirrored in a view of it.
        val_set: Images to evaluate on after each epoch, with the categories of `train_set`. It may be the same object.
        output: Folder of the run.
        settings: How to train.
        resume: Go on with the run in `output`, if there is one.
        cpu: Train on the CPU, even if there is a GPU.
        workers: Processes that read images, for each process that trains.
        log: Called with lines to keep.
        progress: Called with a line on what is done at the moment.

    Returns:
        The metrics of each epoch, as in `summary.csv`: epoch from 0, mean loss, COCO's AP, AP50 and AP75 in percent,
        and the learning rate of the last step.

    Raises:
        DetectionError: Model and datasets do not fit each other, an image cannot be opened or has another size than
            its dataset says, the run in `output` is another, or there is one and `resume` is not set.
        TrainingError: The loss or the weights are not finite any more.
        WriteError: A file cannot be written.
    """
    try:
        from accelerate.utils import gather_object, set_seed
    except ImportError as e:
        raise DetectionError('Training needs accelerate: pip install "timm_spa[detection]".') from e
    settings, output = settings or Settings(), Path(output)
    accelerator = _create_accelerator(settings.mixed_precision, cpu)
    world, rank = accelerator.num_processes, accelerator.process_index
    settings = settings.completed(model.detector_config['detector'], len(train_set), world)
    _check_fit(model, train_set, val_set, rank, world)
    config = model.detector_config
    described = dict(
        detector=config['detector'], model=config['backbone'], model_kwargs=config['backbone_kwargs'], config=config,
        settings=vars(settings), processes=world,
        categories=[dict(id=c['id'], name=c['name']) for c in train_set.categories])
    described = json.loads(json.dumps(described))  # tuples as lists, as they are read again

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(
        parameters, lr=learning_rate(settings, 0, 0), momentum=settings.momentum, weight_decay=settings.weight_decay)
    rows, momentum, scaler_state = _read_state(output / STATE, model, described, resume)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if momentum:
        optimizer.load_state_dict(dict(optimizer.state_dict(), state={
            i: dict(momentum_buffer=tensor) for i, tensor in momentum.items()}))
    if scaler_state and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler_state)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / 'args.yaml') as partial:
            partial.write_text(yaml.safe_dump(described, sort_keys=False), encoding='utf-8')
        if rows:
            write_summary(output / SUMMARY, rows)

    def show(text: str) -> None:
        if progress and accelerator.is_main_process:
            progress(text)

    for epoch in range(len(rows), settings.epochs):
        # every epoch draws its own numbers, and so does the first one after a resume
        set_seed(((settings.seed * 10_007 + epoch) * world + rank) % 2 ** 32)
        order = _order(len(train_set), settings.seed, epoch, world)[rank::world]
        examples = Mirrored(train_set, settings.seed, epoch) if settings.flip else train_set
        loader: Any = DataLoader(
            examples, settings.batch_size, sampler=order, num_workers=workers, collate_fn=collate,
            pin_memory=accelerator.device.type == 'cuda')
        wrapped.train()
        total = torch.zeros(2, dtype=torch.float64)
        for number, (images, targets) in enumerate(read_batches(loader)):
            rate = learning_rate(settings, epoch, epoch * len(loader) + number)
            for group in optimizer.param_groups:
                group['lr'] = rate
            losses = wrapped(
                [image.to(accelerator.device, non_blocking=True) for image in images],
                [{key: value.to(accelerator.device) for key, value in target.items()} for target in targets])
            loss = sum(losses.values())
            value = loss.item()
            if not math.isfinite(value):
                named = ', '.join(f'{name} {part.item():g}' for name, part in losses.items())
                raise TrainingError(
                    f'The loss is {value} at step {number} of epoch {epoch} ({named}). Checkpoints in {output} are '
                    'those of earlier epochs. Train with a lower lr, with clip_grad, or with bf16 in place of fp16.')
            accelerator.backward(loss)
            if settings.clip_grad is not None:
                accelerator.clip_grad_norm_(parameters, settings.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            total += torch.tensor([value * len(images), len(images)], dtype=torch.float64)
            show(f'epoch {epoch}: step {number + 1} of {len(loader)}, loss {total[0] / total[1]:.4f}')
        if world > 1:  # each process has counted its own images into the statistics of the gates
            distribute_bn(model, world, reduce=True)
        _check_finite(model, epoch, output)
        show(f'epoch {epoch}: evaluation')
        found = detect(model, val_set, settings.batch_size, workers, range(rank, len(val_set), world))
        gathered: List[Any] = gather_object(list(found.items()))
        sums = accelerator.reduce(total.float().to(accelerator.device), reduction='sum')
        figures = coco_figures(val_set, dict(sorted(gathered)))
        rows.append({
            'epoch': epoch, 'train_loss': round((sums[0] / sums[1]).item(), 5),
            **{key: round(figures[name], 3) for key, name in METRICS.items()}, 'lr': rate})
        if accelerator.is_main_process:
            best = max(rows, key=lambda row: row['eval_map'])
            if best is rows[-1]:
                save_detector(model, output / 'best', train_set.categories)
            save_detector(model, output / 'last', train_set.categories)
            _write_state(output / STATE, model, optimizer, accelerator.scaler, rows, described)
            write_summary(output / SUMMARY, rows)
            log(
                f'epoch {epoch}: loss {rows[-1]["train_loss"]:.4f}, AP {figures["AP"]:.1f}, '
                f'AP50 {figures["AP50"]:.1f}, AP75 {figures["AP75"]:.1f}; best AP {best["eval_map"]:.1f} of epoch '
                f'{best["epoch"]:.0f}')
        accelerator.wait_for_everyone()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return rows


def _create_accelerator(mixed_precision: str, cpu: bool) -> Any:
    """Creates an Accelerator. The global state of accelerate is reset only where an earlier training here made it."""
    from accelerate.accelerator import Accelerator
    from accelerate.state import AcceleratorState, PartialState, is_initialized

    earlier = getattr(AcceleratorState(), OWNER, None) if is_initialized() else None
    if earlier and (earlier['mixed_precision'], earlier['cpu']) != (mixed_precision, cpu):
        # there is no public way to train otherwise in the same process, e.g. in a notebook
        AcceleratorState._reset_state(reset_partial_state=earlier['made_partial'] and earlier['cpu'] != cpu)
    of_program = is_initialized()
    made_partial = not PartialState._shared_state or bool(earlier and earlier['made_partial'])
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision)
    except ValueError as e:
        if not of_program:  # what has been begun here
            AcceleratorState._reset_state(reset_partial_state=made_partial)
        cause = ' '.join(str(e).split())
        raise DetectionError(
            f'Training with mixed_precision={mixed_precision!r} and cpu={cpu} cannot start: {cause} '
            + ('This program uses accelerate itself: train with its settings, or in another process.' if of_program
               else "Choose another mixed_precision, e.g. 'no'.")) from e
    if not of_program:
        setattr(accelerator.state, OWNER, dict(mixed_precision=mixed_precision, cpu=cpu, made_partial=made_partial))
    if mixed_precision == 'fp16' and accelerator.device.type == 'cpu':  # accelerate would train in float32
        raise DetectionError("mixed_precision='fp16' needs a GPU. Choose 'bf16' or 'no' on a CPU.")
    return accelerator


def _check_fit(model: Any, train_set: CocoDataset, val_set: CocoDataset, rank: int, world: int) -> None:
    check_config(model.detector_config, 'The detector')
    classes = model.detector_config['num_classes']
    names = [[c['name'] for c in dataset.categories] for dataset in (train_set, val_set)]
    if len(names[0]) != classes:
        raise DetectionError(f'{train_set.source} has {len(names[0])} categories, and the detector {classes} classes.')
    if names[0] != names[1]:
        raise DetectionError(
            f'{val_set.source} has other categories than {train_set.source}. Open it with those of the first: '
            'CocoDataset(..., categories=train_set.categories).')
    for dataset in (train_set, val_set):
        check_evaluable(dataset)
        places = range(rank, len(dataset), world)
        for place in places:
            check_image_size(model, *dataset.sizes[place], dataset.folder / dataset.file_names[place])
        dataset.check_images(places)


def _check_finite(model: Any, epoch: int, output: Path) -> None:
    bad = [
        name for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise TrainingError(
            f'Epoch {epoch} is not saved: {len(bad)} tensors of the detector are not finite any more, {bad[0]} first. '
            f'Checkpoints in {output} are those of earlier epochs. Train with a lower lr, or with clip_grad.')


def _order(count: int, seed: int, epoch: int, world: int) -> List[int]:
    """Returns the images of an epoch in the order of training, some twice so that all processes have as many."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    return (order * world)[:math.ceil(count / world) * world]


def _write_state(
        path: Path,
        model: Any,
        optimizer: Any,
        scaler: Any,
        rows: Sequence[Row],
        described: Dict[str, Any],
) -> None:
    tensors = {f'model.{name}': tensor for name, tensor in model.state_dict().items()}
    for i, state in optimizer.state_dict()['state'].items():
        if state.get('momentum_buffer') is not None:
            tensors[f'momentum.{i}'] = state['momentum_buffer']
    facts = dict(rows=list(rows), described=described, scaler=scaler.state_dict() if scaler is not None else {})
    with replacing(path) as partial:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial,
            metadata=dict(timm_spa_detection=json.dumps(facts)))


def _read_state(
        path: Path,
        model: Any,
        described: Dict[str, Any],
        resume: bool,
) -> Tuple[List[Row], Dict[int, torch.Tensor], Dict[str, Any]]:
    """Loads the weights of a run into a model; returns its metrics, momentum, and the state of the loss scaler."""
    if not path.exists():
        return [], {}, {}
    if not resume:
        raise DetectionError(f'{path.parent} has a run in it. Go on with it by --resume, or name another folder.')
    try:
        with safetensors.safe_open(path, 'pt') as f:
            facts = json.loads((f.metadata() or {})['timm_spa_detection'])
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as e:
        raise DetectionError(f'{path} cannot be read as the state of a training run: {e}') from e
    for key, value in described.items():
        was = facts['described'].get(key)
        if was != value:
            which = [k for k in value if was.get(k) != value[k]] if isinstance(value, dict) else []
            said = '; '.join(f'{k} was {was.get(k)!r} and is {value[k]!r}' for k in which)
            raise DetectionError(
                f'The run in {path.parent} cannot go on with another {key}: {said or f"was {was!r}, is {value!r}"}.')
    parts: Dict[str, Dict[str, torch.Tensor]] = {'model': {}, 'momentum': {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition('.')
        parts[kind][rest] = tensor
    check_weights(parts['model'], model, path)
    return facts['rows'], {int(i): tensor for i, tensor in parts['momentum'].items()}, facts['scaler']
