"""Training of detectors with accelerate: on one GPU, on several GPUs, or on the CPU.

Files in the folder of a run:

- `training_state.safetensors`: weights, momentum and metrics. A run that was killed resumes from the end of its last
  complete epoch, with identical results.
- `last/` and `best/`: checkpoints of the last epoch and of the epoch with the highest AP, see `load_detector`.
- `summary.csv`: metrics of each epoch, in timm's layout.
- `args.yaml`: detector and settings.
"""
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import torch
import yaml
from timm.utils import distribute_bn

from ..checkpoints.files import replacing
from ..training.guard import TrainingError
from ..training.log import write_summary
from .arguments import check_config
from .backbone import DetectionError
from .checkpoint import save_detector
from .data import CocoDataset, Mirrored, create_loader, read_batches
from .evaluate import check_evaluable, coco_figures, detect
from .models import check_image_size
from .settings import BASE_RATES, Settings, learning_rate
from .training_state import STATE, Row, read_state, write_state

__all__ = ['BASE_RATES', 'METRICS', 'STATE', 'SUMMARY', 'Settings', 'learning_rate', 'train']

SUMMARY = 'summary.csv'
OWNER = 'timm_spa_training'  # attribute of accelerate's state that marks a state created here
METRICS = {'eval_map': 'AP', 'eval_ap50': 'AP50', 'eval_ap75': 'AP75'}


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
        model: Detector of `retinanet` or `cascade_rcnn`, with one class for each category of `train_set`.
        train_set: Training images. The dataset is not changed: images are mirrored in a view of it.
        val_set: Images to evaluate on after each epoch, with the categories of `train_set`. May be the same object.
        output: Folder of the run.
        settings: Settings; the paper's by default.
        resume: Resume the run in `output`, if it contains one.
        cpu: Train on the CPU, even if a GPU is available.
        workers: Number of processes that read images, for each training process.
        log: Called with one line after each epoch.
        progress: Called with one line during an epoch.

    Returns:
        The metrics of each epoch, as in `summary.csv`: epoch from 0, mean loss, COCO's AP, AP50 and AP75 in percent,
        and the learning rate of the last step.

    Raises:
        DetectionError: Model and datasets do not match, an image cannot be opened or has another size than its
            annotations, `output` contains a different run, or it contains a run and `resume` is not set.
        TrainingError: The loss or the weights are no longer finite.
        WriteError: A file cannot be written.
    """
    run = _Run(model, train_set, val_set, Path(output), settings or Settings(), cpu, workers, log, progress)
    run.start(resume)
    for epoch in range(len(run.rows), run.settings.epochs):
        loss = run.train_epoch(epoch)
        figures = run.evaluate(epoch)
        run.finish_epoch(epoch, loss, figures)
    run.finish()
    return run.rows


class _Run:
    """One process of a training, with its model, optimizer and the metrics so far."""

    def __init__(
            self,
            model: Any,
            train_set: CocoDataset,
            val_set: CocoDataset,
            output: Path,
            settings: Settings,
            cpu: bool,
            workers: int,
            log: Callable[[str], None],
            progress: Optional[Callable[[str], None]],
    ):
        self.accelerator = _create_accelerator(settings.mixed_precision, cpu)
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.settings = settings.completed(model.detector_config['detector'], len(train_set), self.processes)
        self.model, self.train_set, self.val_set = model, train_set, val_set
        self.output, self.workers, self.log = output, workers, log
        self.progress = progress if self.accelerator.is_main_process else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rows: List[Row] = []

    def start(self, resume: bool) -> None:
        """Checks model and datasets, loads the state of an earlier run, and writes the arguments of this run."""
        _check_fit(self.model, self.train_set, self.val_set, self.rank, self.processes)
        self.arguments = self._describe_arguments()
        optimizer: Any = torch.optim.SGD(
            self.parameters, lr=learning_rate(self.settings, 0, 0), momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay)
        self.rows, momentum, scaler = read_state(self.output / STATE, self.model, self.arguments, resume)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if momentum:
            buffers = {i: dict(momentum_buffer=tensor) for i, tensor in momentum.items()}
            self.optimizer.load_state_dict(dict(self.optimizer.state_dict(), state=buffers))
        if scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with replacing(self.output / 'args.yaml') as partial:
                partial.write_text(yaml.safe_dump(self.arguments, sort_keys=False), encoding='utf-8')
            if self.rows:
                write_summary(self.output / SUMMARY, self.rows)

    def train_epoch(self, epoch: int) -> float:
        """Trains for one epoch, and returns the mean loss over all processes."""
        from accelerate.utils import set_seed

        settings, device = self.settings, self.accelerator.device
        # a seed for each epoch: a resumed run draws the same numbers as an uninterrupted one
        set_seed(((settings.seed * 10_007 + epoch) * self.processes + self.rank) % 2 ** 32)
        indices = _order(len(self.train_set), settings.seed, epoch, self.processes)[self.rank::self.processes]
        examples = Mirrored(self.train_set, settings.seed, epoch) if settings.flip else self.train_set
        loader = create_loader(
            examples, indices, settings.batch_size, self.workers, pin_memory=device.type == 'cuda')
        self.wrapped.train()
        total = torch.zeros(2, dtype=torch.float64)  # sum of the losses, number of images
        for step, (images, targets) in enumerate(read_batches(loader)):
            rate = learning_rate(settings, epoch, epoch * len(loader) + step)
            loss = self._train_step(images, targets, rate, f'step {step} of epoch {epoch}')
            total += torch.tensor([loss * len(images), len(images)], dtype=torch.float64)
            self._show(f'epoch {epoch}: step {step + 1} of {len(loader)}, loss {total[0] / total[1]:.4f}')
        if self.processes > 1:  # each process has updated the statistics of the gates with its own images
            distribute_bn(self.model, self.processes, reduce=True)
        _check_finite(self.model, epoch, self.output)
        sums = self.accelerator.reduce(total.float().to(device), reduction='sum')
        return (sums[0] / sums[1]).item()

    def _train_step(
            self,
            images: List[torch.Tensor],
            targets: List[Dict[str, torch.Tensor]],
            rate: float,
            step: str,
    ) -> float:
        """Updates the weights, and returns the loss."""
        device = self.accelerator.device
        for group in self.optimizer.param_groups:
            group['lr'] = rate
        losses = self.wrapped(
            [image.to(device, non_blocking=True) for image in images],
            [{key: value.to(device) for key, value in target.items()} for target in targets])
        loss = sum(losses.values())
        value = loss.item()
        if not math.isfinite(value):
            parts = ', '.join(f'{name} {part.item():g}' for name, part in losses.items())
            raise TrainingError(
                f'The loss is {value} at {step} ({parts}). Checkpoints in {self.output} are from earlier epochs. Train '
                'with a lower lr, with clip_grad, or with bf16 instead of fp16.')
        self.accelerator.backward(loss)
        if self.settings.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def evaluate(self, epoch: int) -> Dict[str, float]:
        """Returns COCO's figures on the validation images, which the processes share."""
        from accelerate.utils import gather_object

        self._show(f'epoch {epoch}: evaluation')
        indices = range(self.rank, len(self.val_set), self.processes)
        detections = detect(self.model, self.val_set, self.settings.batch_size, self.workers, indices)
        gathered: List[Any] = gather_object(list(detections.items()))
        return coco_figures(self.val_set, dict(sorted(gathered)))

    def finish_epoch(self, epoch: int, loss: float, figures: Dict[str, float]) -> None:
        """Adds the metrics of an epoch, and writes checkpoints and state."""
        metrics = {key: round(figures[name], 3) for key, name in METRICS.items()}
        rate = self.optimizer.param_groups[0]['lr']
        self.rows.append({'epoch': epoch, 'train_loss': round(loss, 5), **metrics, 'lr': rate})
        if self.accelerator.is_main_process:
            best = max(self.rows, key=lambda row: row['eval_map'])
            if best is self.rows[-1]:
                save_detector(self.model, self.output / 'best', self.train_set.categories)
            save_detector(self.model, self.output / 'last', self.train_set.categories)
            write_state(
                self.output / STATE, self.model, self.optimizer, self.accelerator.scaler, self.rows, self.arguments)
            write_summary(self.output / SUMMARY, self.rows)
            self.log(
                f'epoch {epoch}: loss {self.rows[-1]["train_loss"]:.4f}, AP {figures["AP"]:.1f}, '
                f'AP50 {figures["AP50"]:.1f}, AP75 {figures["AP75"]:.1f}; best AP {best["eval_map"]:.1f} in epoch '
                f'{best["epoch"]:.0f}')
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Removes accelerate's wrapper from the model's forward."""
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)

    def _describe_arguments(self) -> Dict[str, Any]:
        """Returns the content of args.yaml, as JSON types. A run resumes only with equal arguments."""
        config = self.model.detector_config
        arguments = dict(
            detector=config['detector'], model=config['backbone'], model_kwargs=config['backbone_kwargs'],
            config=config, settings=vars(self.settings), processes=self.processes,
            categories=[dict(id=c['id'], name=c['name']) for c in self.train_set.categories])
        return json.loads(json.dumps(arguments))

    def _show(self, text: str) -> None:
        if self.progress:
            self.progress(text)


def _create_accelerator(mixed_precision: str, cpu: bool) -> Any:
    """Creates an Accelerator. Resets accelerate's global state only if an earlier call created that state."""
    try:
        from accelerate.accelerator import Accelerator
        from accelerate.state import AcceleratorState, PartialState, is_initialized
    except ImportError as e:
        raise DetectionError('Training needs accelerate: pip install "timm_spa[detection]".') from e

    earlier = getattr(AcceleratorState(), OWNER, None) if is_initialized() else None
    if earlier and (earlier['mixed_precision'], earlier['cpu']) != (mixed_precision, cpu):
        # accelerate has no public way to train with other settings in the same process, e.g. in a notebook
        AcceleratorState._reset_state(reset_partial_state=earlier['made_partial'] and earlier['cpu'] != cpu)
    in_use = is_initialized()
    made_partial = not PartialState._shared_state or bool(earlier and earlier['made_partial'])
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision)
    except ValueError as e:
        if not in_use:  # the incomplete state is ours
            AcceleratorState._reset_state(reset_partial_state=made_partial)
        cause = ' '.join(str(e).split())
        raise DetectionError(
            f'Training with mixed_precision={mixed_precision!r} and cpu={cpu} cannot start: {cause} '
            + ('This program uses accelerate itself: train with its settings, or in another process.' if in_use
               else "Choose another mixed_precision, e.g. 'no'.")) from e
    if not in_use:
        setattr(accelerator.state, OWNER, dict(mixed_precision=mixed_precision, cpu=cpu, made_partial=made_partial))
    if mixed_precision == 'fp16' and accelerator.device.type == 'cpu':  # accelerate would train in float32
        raise DetectionError("mixed_precision='fp16' needs a GPU. Choose 'bf16' or 'no' on a CPU.")
    return accelerator


def _check_fit(model: Any, train_set: CocoDataset, val_set: CocoDataset, rank: int, processes: int) -> None:
    """Checks categories, and the sizes of the images of this process."""
    check_config(model.detector_config, 'The detector')
    num_classes = model.detector_config['num_classes']
    names, val_names = ([c['name'] for c in dataset.categories] for dataset in (train_set, val_set))
    if len(names) != num_classes:
        raise DetectionError(
            f'{train_set.source} has {len(names)} categories, but the detector has {num_classes} classes. Create the '
            f'detector with num_classes={len(names)}.')
    if names != val_names:
        raise DetectionError(
            f'{val_set.source} has other categories than {train_set.source}. Open it with '
            'CocoDataset(..., categories=train_set.categories).')
    for dataset in (train_set, val_set):
        check_evaluable(dataset)
        indices = range(rank, len(dataset), processes)
        for index in indices:
            check_image_size(model, *dataset.sizes[index], dataset.folder / dataset.file_names[index])
        dataset.check_images(indices)


def _check_finite(model: Any, epoch: int, output: Path) -> None:
    invalid = [
        name for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()]
    if invalid:
        raise TrainingError(
            f'Epoch {epoch} is not saved: {len(invalid)} tensors of the detector are not finite, e.g. {invalid[0]}. '
            f'Checkpoints in {output} are from earlier epochs. Train with a lower lr, or with clip_grad.')


def _order(count: int, seed: int, epoch: int, processes: int) -> List[int]:
    """Returns the indices of an epoch in random order. Some are repeated so that all processes get the same number."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    return (order * processes)[:math.ceil(count / processes) * processes]
