"""Checks that `timm_spa.run` adds to timm's scripts, which run unchanged.

A misspelt split makes timm read all images, a missing class folder shifts the numbers of all later classes, and most
wrong arguments end in a long traceback. The checks replace functions that the scripts call, while a script runs. The
arguments are checked and completed as soon as the script has parsed them.
"""
import argparse
import logging
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import timm.data
import timm.models
import timm.task

from .._errors import TimmSpaError, UsageError
from .._names import check_model_name, did_you_mean
from ..checkpoints.fit import first_few
from ..checkpoints.reading import CheckpointError, check_shapes, read_weights
from .arguments import (
    FILE_OPTIONS,
    ScriptError,
    cause_of,
    check_class_map,
    check_config,
    check_device,
    check_file,
    check_model,
    check_output,
    check_writable,
    checkpoints_in,
    outputs_of,
    valid_labels,
)
from .guard import guarded_training, replaced
from .image_folder import (
    class_names,
    class_numbers,
    is_image_folder,
    number_of_classes,
    open_dataset,
    renumbered,
)
from .log import CLASSES_FILE, read_classes

__all__ = ['ScriptError', 'guarded_script']

_logger = logging.getLogger(__name__)


class _Guard:
    """Arguments of one script, and what is known of its classes."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.args: Any = argparse.Namespace()
        self.model: Any = None
        self.class_to_idx: Dict[str, int] = {}  # of the training data
        self.class_names: List[str] = []  # the same, in the order of the model's outputs
        self.train_root = ''

    # arguments

    def parsed(self, parser: argparse.ArgumentParser, args: argparse.Namespace, unknown: List[str]) -> None:
        """Checks what a parser of the script returns; train.py has a first one that knows only --config."""
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
        """Checks arguments before anything slow begins, and fills in those that follow from files."""
        root = self.root()
        if 'data_dir' in args and is_image_folder(getattr(args, 'dataset', '')):
            split = getattr(args, 'train_split', getattr(args, 'split', ''))
            if not root or not os.path.exists(root):
                open_dataset('', root, split)  # raises
        check_device(args)
        for option in FILE_OPTIONS:
            if getattr(args, option, None):
                check_file(option, getattr(args, option), self.script)
        if getattr(args, 'model', None):
            check_model(args.model, self.script)
        if getattr(args, 'class_map', None):
            check_class_map(args.class_map, root or '')
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
        """Checks and fills in the arguments of train.py."""
        if args.pretrained_path and not args.pretrained:
            _logger.info(f'--pretrained-path {args.pretrained_path} implies --pretrained.')
            args.pretrained = True
        check_output(args)
        if args.num_classes is None and args.resume and args.resume != 'auto':
            args.num_classes = outputs_of(args.resume, args.model)
        if args.num_classes is None and is_image_folder(args.dataset):
            dataset = self.open(
                args.dataset, args.data_dir or args.data, args.train_split, is_training=True, class_map=args.class_map,
                input_key=args.input_key)
            args.num_classes = number_of_classes(class_numbers(dataset))
            _logger.info(f'--num-classes {args.num_classes}, the number of classes in {_root(dataset)}.')
        if args.num_classes is None:
            _logger.warning(f'--num-classes is missing: {args.model} keeps the number of outputs that it has in timm.')

    def root(self) -> Optional[str]:
        return getattr(self.args, 'data_dir', None) or getattr(self.args, 'data', None)

    # data

    def open(self, name: str, root: Any, split: str, **kwargs: Any) -> Any:
        """Opens a dataset; the images of an image folder must be in class folders if their classes matter."""
        option = '--split'
        if 'train_split' in self.args:
            option = '--train-split' if kwargs.get('is_training') else '--val-split'
        dataset = open_dataset(name, root, split, option, _timm_create_dataset, **kwargs)
        if self.script in ('train', 'validate') and '' in class_numbers(dataset) and not (
                kwargs.get('class_map') or getattr(self.args, 'real_labels', '')):
            raise UsageError(
                f'{_root(dataset)} has images outside of class folders: timm would make a class of them. Move '
                'each image into the folder of its class.')
        return dataset

    def create_dataset(self, name: str, root: Any = None, split: str = 'validation', **kwargs: Any) -> Any:
        """Opens a dataset, with classes numbered as the model has them."""
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
                    f'Training and validation read the same images, those of {folder}: the accuracy will say nothing '
                    'about other images. Put images for validation into a folder of their own.')
            if self.class_to_idx:
                return renumbered(
                    dataset, self.class_to_idx, f'the training data in {self.train_root}',
                    'Rename or remove them, or name the classes to use with --class-map FILE.', reopen)
        elif self.script == 'validate' and is_image_folder(name):
            return self.for_validation(dataset, reopen, bool(kwargs.get('class_map')))
        elif self.script == 'inference' and not (self.args.fullname or self.args.no_console_results):
            names = dataset.filenames(basename=True)
            if len({*names}) < len(names):  # timm's table for the console needs one row a name
                self.args.fullname = True
        return dataset

    def check_outputs(self, classes: Dict[str, int], root: Any) -> None:
        """Compares the number of classes of the training data with that of the model."""
        count, outputs = number_of_classes(classes), getattr(self.args, 'num_classes', None)
        if outputs and count > outputs:
            raise UsageError(
                f'--num-classes is {outputs}, and {root} has {count} classes ({first_few(list(classes))}). Set '
                f'--num-classes {count}, or remove the folders that are no classes.')
        if outputs and count < outputs:
            _logger.warning(
                f'The model has {outputs} outputs, and {root} has {count} classes: {outputs - count} outputs have no '
                f'images. If that is not intended, set --num-classes {count}.')

    def for_validation(self, dataset: Any, reopen: Callable[..., Any], mapped: bool) -> Any:
        """Numbers the classes of validate.py's image folder as the trained model does."""
        args, classes = self.args, class_numbers(dataset)
        outputs, count = args.num_classes, number_of_classes(classes)
        if args.real_labels:
            return dataset
        valid = valid_labels(args.valid_labels, outputs) if args.valid_labels else range(outputs)
        if mapped:
            if count > len(valid):
                raise UsageError(
                    f'--class-map {args.class_map} has {count} classes, and the model {len(valid)} outputs. Give the '
                    'class map of this model.')
            return dataset
        remedy = 'Name the folders with --class-map FILE, one a line, in the order of the outputs of the model.'
        if args.checkpoint:
            source, names = str(Path(args.checkpoint).parent / CLASSES_FILE), read_classes(Path(args.checkpoint).parent)
            if len(names) > outputs:
                raise UsageError(
                    f'{source} names {len(names)} classes, and {args.checkpoint} has {outputs} outputs: the files are '
                    'of two trainings. Move the checkpoint to a folder of its own.')
        else:
            source, names = f'the weights of {args.model}', _labels(self.model)
            names = names if len(names) == outputs else []
        if names:
            expected = {names[output]: index for index, output in enumerate(valid) if output < len(names)}
            return renumbered(dataset, expected, source, remedy, reopen)
        if count != len(valid):
            raise UsageError(
                f'{_root(dataset)} has {count} class folders ({first_few(list(classes))}), and the model '
                f'{len(valid)} outputs: timm would number the folders from 0 on. {remedy}')
        return dataset

    # weights

    def create_model(self, model_name: str, *args: Any, checkpoint_path: Any = None, **kwargs: Any) -> Any:
        """Creates a model and loads its checkpoint; whatever goes wrong is one message."""
        check_model_name(model_name, ScriptError)
        self.check_published(model_name, kwargs)
        try:
            self.model = _timm_create_model(model_name, *args, **kwargs)
        except TimmSpaError:
            raise
        except Exception as e:  # timm, torch and the Hub each raise their own
            file = (kwargs.get('pretrained_cfg_overlay') or {}).get('file')
            if file:
                read_weights(file)  # raises what is wrong with an unreadable file
            raise ScriptError(
                f'The model {model_name!r} cannot be created: {cause_of(e)}. Check --model and --model-kwargs.') from e
        if checkpoint_path:
            other = ' --pretrained-path takes weights of another number of classes.' if self.script == 'train' else ''
            with _explained(self.model, checkpoint_path, other):
                _timm_load_checkpoint(self.model, checkpoint_path)
            # the names in the configuration are of the classes of other weights
            names = read_classes(Path(checkpoint_path).parent)
            self.model.pretrained_cfg = dict(
                self.model.pretrained_cfg, label_names=names if 0 < len(names) <= self.model.num_classes else None,
                label_descriptions=None)
        return self.model

    def check_published(self, model_name: str, kwargs: Dict[str, Any]) -> None:
        """Refuses to evaluate published weights with a classifier that was never trained."""
        wanted = kwargs.get('num_classes')
        if self.script not in ('validate', 'inference') or not kwargs.get('pretrained') or not wanted or (
                ':' in model_name):
            return
        published = getattr(timm.models.get_pretrained_cfg(model_name), 'num_classes', wanted)
        if published != wanted:
            raise ScriptError(
                f'The published weights of {model_name} have {published} classes, and --num-classes is {wanted}: the '
                'classifier would be random. Leave --num-classes out, or add --checkpoint FILE.')

    def load_checkpoint(self, model: Any, checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        with _explained(model, checkpoint_path):
            return _timm_load_checkpoint(model, checkpoint_path, *args, **kwargs)

    def resume(self, task: Any, checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        with _explained(task.get_trainable_module(), checkpoint_path):
            return _timm_resume(task, checkpoint_path, *args, **kwargs)


@contextmanager
def _explained(model: Any, path: str, remedy: str = '') -> Iterator[None]:
    """Turns the errors of loading a checkpoint into one message that names the tensors."""
    try:
        yield
    except TimmSpaError:
        raise
    except Exception as e:  # every reader has its own errors for a file that is not its own
        try:
            check_shapes(read_weights(path).state_dict, model, path)
        except CheckpointError as explained:
            raise ScriptError(f'{explained}{remedy}') from e
        raise ScriptError(f'{path} cannot be loaded: {cause_of(e)}') from e


def _root(dataset: Any) -> str:
    return str(getattr(getattr(dataset, 'reader', dataset), 'root', None) or '')


def _labels(model: Any) -> List[str]:
    return list((getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ())


_timm_create_dataset = timm.data.create_dataset
_timm_create_model = timm.models.create_model
_timm_load_checkpoint = timm.models.load_checkpoint
_timm_resume = timm.task.resume_task_checkpoint
_parse_known_args = argparse.ArgumentParser.parse_known_args


@contextmanager
def guarded_script(script: str) -> Iterator[None]:
    """Installs the checks of one of timm's scripts within the context.

    Args:
        script: Name of the script without its suffix.
    """
    guard = _Guard(script)

    def parse_known_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parsed, unknown = _parse_known_args(parser, *args, **kwargs)
        guard.parsed(parser, parsed, unknown)
        return parsed, unknown

    with ExitStack() as stack:
        stack.enter_context(replaced(
            (argparse.ArgumentParser, 'parse_known_args', parse_known_args),
            (timm.models, 'create_model', guard.create_model),
            (timm.models, 'load_checkpoint', guard.load_checkpoint),
            (timm.data, 'create_dataset', guard.create_dataset),
            (timm.task, 'resume_task_checkpoint', guard.resume),
        ))
        if script == 'train':
            stack.enter_context(guarded_training(guard.class_names))
        yield
