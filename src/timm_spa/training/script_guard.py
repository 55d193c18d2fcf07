"""Checks that `timm_spa.run` adds to timm's scripts, which run unchanged.

A misspelt split makes timm read all images. A missing class folder shifts the numbers of all later classes. Most
invalid arguments end in a long traceback. While a script runs, `guarded_script` replaces the functions of timm that
the script calls. Arguments are checked and completed as soon as the script has parsed them.
"""
import argparse
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import timm.data
import timm.models
import timm.task

from .._errors import TimmSpaError, UsageError
from .._names import check_model_name, did_you_mean
from ..checkpoints.fit import first_few
from ..checkpoints.reading import CheckpointError, check_shapes, read_weights
from .arguments import (
    FILE_OPTIONS,
    cause_of,
    check_config,
    check_device,
    check_file,
    check_model,
    check_output,
    check_writable,
    checkpoints_in,
    outputs_of,
    read_valid_labels,
)
from .guard import Replacement, TrainingError, replaced, training_replacements
from .image_folder import (
    class_names,
    class_numbers,
    is_image_folder,
    number_of_classes,
    open_dataset,
    renumbered,
)
from .log import CLASSES_FILE, read_classes

__all__ = ['guarded_script']

_logger = logging.getLogger(__name__)

_parse_known_args = argparse.ArgumentParser.parse_known_args
_timm_create_dataset = timm.data.create_dataset
_timm_create_model = timm.models.create_model
_timm_load_checkpoint = timm.models.load_checkpoint
_timm_resume = timm.task.resume_task_checkpoint


@contextmanager
def guarded_script(script: str) -> Iterator[None]:
    """Installs the checks of one of timm's scripts within the context.

    Args:
        script: Name of the script without its suffix.
    """
    guard = _Guard(script)

    def parse_known_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parsed, unknown = _parse_known_args(parser, *args, **kwargs)
        guard.check_parsed(parser, parsed, unknown)
        return parsed, unknown

    replacements: List[Replacement] = [
        (argparse.ArgumentParser, 'parse_known_args', parse_known_args),
        (timm.data, 'create_dataset', guard.create_dataset),
        (timm.models, 'create_model', guard.create_model),
        (timm.models, 'load_checkpoint', guard.load_checkpoint),
        (timm.task, 'resume_task_checkpoint', guard.resume),
    ]
    if script == 'train':
        replacements += training_replacements(guard.class_names)
    with replaced(replacements):
        yield


class _Guard:
    """State of the checks during one script: its arguments, its model and the classes of its data."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.args: Any = argparse.Namespace()
        self.model: Any = None
        self.class_to_idx: Dict[str, int] = {}  # of the training data
        self.class_names: List[str] = []  # the same, in the order of the model's outputs
        self.train_root = ''

    # arguments

    def check_parsed(self, parser: argparse.ArgumentParser, args: argparse.Namespace, unknown: List[str]) -> None:
        """Checks the result of a parser of the script; the first parser of train.py only knows --config."""
        if vars(args).keys() == {'config'}:
            if args.config:
                check_config(args.config)
        elif not (unknown or vars(self.args)):  # the script refuses unknown arguments itself
            known = {action.dest for action in parser._actions}
            for key in vars(args):
                if key not in known:
                    raise UsageError(
                        f'The file of --config has the key {key!r}, but {self.script}.py has no such option and would '
                        f'ignore it.{did_you_mean(key, known, 1)} Correct or remove the key.')
            self.args = args
            self.complete(args)

    def complete(self, args: Any) -> None:
        """Checks arguments before anything slow begins, and fills in arguments that follow from files."""
        if 'data_dir' in args and is_image_folder(getattr(args, 'dataset', '')):
            root = args.data_dir or args.data
            if not root or not os.path.exists(root):
                open_dataset('', root, getattr(args, 'train_split', getattr(args, 'split', '')))  # raises
        check_device(args)
        for option in FILE_OPTIONS:
            if getattr(args, option, None):
                check_file(option, getattr(args, option), self.script)
        if getattr(args, 'model', None):
            check_model(args.model, self.script)
        if self.script == 'train':
            self.complete_training(args)
        elif getattr(args, 'checkpoint', None) and getattr(args, 'num_classes', 0) is None:
            file = args.checkpoint
            if os.path.isdir(file):
                file = checkpoints_in(file)[0]
            args.num_classes = outputs_of(file, args.model)
        for option in ('results_file', 'results_dir'):
            check_writable(option, getattr(args, option, None))

    def complete_training(self, args: Any) -> None:
        """Checks and fills in the arguments of train.py. Those of another tag may lack some options."""
        if getattr(args, 'pretrained_path', None) and not args.pretrained:
            _logger.info(f'--pretrained-path {args.pretrained_path} implies --pretrained.')
            args.pretrained = True
        check_output(args)
        if getattr(args, 'num_classes', 0) is not None:
            return
        if args.resume and args.resume != 'auto':
            args.num_classes = outputs_of(args.resume, args.model)
        if args.num_classes is None and is_image_folder(args.dataset):
            options = {key: getattr(args, key) for key in ('class_map', 'input_key') if key in args}
            dataset = self.open(
                args.dataset, args.data_dir or args.data, args.train_split, is_training=True, **options)
            args.num_classes = number_of_classes(class_numbers(dataset))
            _logger.info(f'--num-classes {args.num_classes}: the number of classes in {_root(dataset)}.')
        if args.num_classes is None:
            _logger.warning(f"--num-classes is missing: {args.model} keeps timm's number of outputs.")

    # data

    def open(self, name: str, root: Any, split: str, **kwargs: Any) -> Any:
        """Opens a dataset; raises if classes matter and images are outside class folders."""
        option = '--split'
        if 'train_split' in self.args:
            option = '--train-split' if kwargs.get('is_training') else '--val-split'
        dataset = open_dataset(name, root, split, option, _timm_create_dataset, **kwargs)
        if self.script in ('train', 'validate') and '' in class_numbers(dataset) and not (
                kwargs.get('class_map') or getattr(self.args, 'real_labels', '')):
            raise UsageError(
                f'{_root(dataset)} has images outside class folders, and timm would treat them as a class. Move each '
                'image into the folder of its class.')
        return dataset

    def create_dataset(self, name: str, root: Any = None, split: str = 'validation', **kwargs: Any) -> Any:
        """Opens a dataset with the class numbers of the model."""
        def reopen(**more: Any) -> Any:
            return self.open(name, root, split, **{**kwargs, **more})

        dataset = reopen()
        classes, folder = class_numbers(dataset), _root(dataset)
        if not classes:
            return dataset
        if kwargs.get('is_training'):
            self.check_outputs(classes, folder or name)
            self.train_root = folder
            self.class_to_idx = classes
            self.class_names[:] = class_names(classes)
        elif self.script == 'train' and is_image_folder(name):
            if self.train_root and os.path.realpath(folder) == os.path.realpath(self.train_root):
                _logger.warning(
                    f'Training and validation read the same images, from {folder}: the accuracy will not measure '
                    'generalization. Use separate images for validation.')
            if self.class_to_idx:
                return renumbered(
                    dataset, self.class_to_idx, f'the training data in {self.train_root}',
                    'Rename or remove them, or list the classes to use with --class-map FILE.', reopen)
        elif self.script == 'validate' and is_image_folder(name):
            return self.for_validation(dataset, reopen, bool(kwargs.get('class_map')))
        elif self.script == 'inference' and not (self.args.fullname or self.args.no_console_results):
            names = dataset.filenames(basename=True)
            if len({*names}) < len(names):  # timm's table for the console needs unique names
                self.args.fullname = True
        return dataset

    def check_outputs(self, classes: Dict[str, int], root: Any) -> None:
        """Compares the number of classes of the training data with the number of outputs of the model."""
        count, outputs = number_of_classes(classes), getattr(self.args, 'num_classes', None)
        if outputs and count > outputs:
            raise UsageError(
                f'--num-classes is {outputs}, but {root} has {count} classes ({first_few(list(classes))}). Set '
                f'--num-classes {count}, or remove folders that are not classes.')
        if outputs and count < outputs:
            _logger.warning(
                f'The model has {outputs} outputs, but {root} has {count} classes: {outputs - count} outputs have no '
                f'images. If this is not intended, set --num-classes {count}.')

    def for_validation(self, dataset: Any, reopen: Callable[..., Any], has_class_map: bool) -> Any:
        """Returns the dataset of validate.py with the class numbers of the trained model."""
        args, classes = self.args, class_numbers(dataset)
        outputs, count = args.num_classes, number_of_classes(classes)
        if args.real_labels:
            return dataset
        labels: Sequence[int] = range(outputs)
        if args.valid_labels:
            labels = read_valid_labels(args.valid_labels, outputs)
        if has_class_map:
            if count > len(labels):
                raise UsageError(
                    f'--class-map {args.class_map} has {count} classes, but the model has {len(labels)} outputs. Use '
                    'the class map of this model.')
            return dataset
        remedy = "List the folders with --class-map FILE, one per line, in the order of the model's outputs."
        if args.checkpoint:
            source, names = str(Path(args.checkpoint).parent / CLASSES_FILE), read_classes(Path(args.checkpoint).parent)
            if len(names) > outputs:
                raise UsageError(
                    f'{source} has {len(names)} classes, but {args.checkpoint} has {outputs} outputs: the files belong '
                    'to different trainings. Move the checkpoint to another folder.')
        else:
            cfg = getattr(self.model, 'pretrained_cfg', None) or {}
            source, names = f'the weights of {args.model}', list(cfg.get('label_names') or ())
            names = names if len(names) == outputs else []
        if names:
            expected = {names[output]: index for index, output in enumerate(labels) if output < len(names)}
            return renumbered(dataset, expected, source, remedy, reopen)
        if count != len(labels):
            raise UsageError(
                f'{_root(dataset)} has {count} class folders ({first_few(list(classes))}), but the model has '
                f'{len(labels)} outputs: timm would number the folders from 0 on. {remedy}')
        return dataset

    # weights

    def create_model(self, model_name: str, *args: Any, checkpoint_path: Any = None, **kwargs: Any) -> Any:
        """Creates a model and loads its checkpoint, with one message for any error."""
        check_model_name(model_name, UsageError)
        self.check_published(model_name, kwargs)
        try:
            self.model = _timm_create_model(model_name, *args, **kwargs)
        except TimmSpaError:
            raise
        except Exception as e:  # timm, torch and the Hub each raise their own
            file = (kwargs.get('pretrained_cfg_overlay') or {}).get('file')
            if file:
                read_weights(file)  # raises with the cause if the file cannot be read
            raise TrainingError(
                f'The model {model_name!r} cannot be created: {cause_of(e)}. Check --model and --model-kwargs.') from e
        if checkpoint_path:
            hint = ' Use --pretrained-path for weights of other classes.' if self.script == 'train' else ''
            with _load_errors(self.model, checkpoint_path, hint):
                _timm_load_checkpoint(self.model, checkpoint_path)
            # the names in the configuration belong to other weights
            names = read_classes(Path(checkpoint_path).parent)
            self.model.pretrained_cfg = dict(
                self.model.pretrained_cfg, label_names=names if 0 < len(names) <= self.model.num_classes else None,
                label_descriptions=None)
        return self.model

    def check_published(self, model_name: str, kwargs: Dict[str, Any]) -> None:
        """Raises if published weights would be evaluated with an untrained classifier."""
        requested = kwargs.get('num_classes')
        if self.script not in ('validate', 'inference') or not kwargs.get('pretrained') or not requested or (
                ':' in model_name):
            return
        published = getattr(timm.models.get_pretrained_cfg(model_name), 'num_classes', requested)
        if published != requested:
            raise UsageError(
                f'The published weights of {model_name} have {published} classes, but --num-classes is {requested}: '
                'the classifier would be random. Remove --num-classes, or add --checkpoint FILE.')

    def load_checkpoint(self, model: Any, checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        with _load_errors(model, checkpoint_path):
            return _timm_load_checkpoint(model, checkpoint_path, *args, **kwargs)

    def resume(self, task: Any, checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        with _load_errors(task.get_trainable_module(), checkpoint_path):
            return _timm_resume(task, checkpoint_path, *args, **kwargs)


@contextmanager
def _load_errors(model: Any, path: str, hint: str = '') -> Iterator[None]:
    """Turns errors of loading a checkpoint into one message that names the tensors."""
    try:
        yield
    except TimmSpaError:
        raise
    except Exception as e:  # each file format raises its own
        try:
            check_shapes(read_weights(path).state_dict, model, path)
        except CheckpointError as mismatch:
            raise TrainingError(f'{mismatch}{hint}') from e
        raise TrainingError(f'{path} cannot be loaded: {cause_of(e)}. Use a checkpoint of the same training.') from e


def _root(dataset: Any) -> str:
    return str(getattr(getattr(dataset, 'reader', dataset), 'root', None) or '')
