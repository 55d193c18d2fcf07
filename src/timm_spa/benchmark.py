"""Speed and memory of models, measured in turn, as ratios to a baseline.

A machine's speed drifts: with its temperature, its neighbours, its clock. So every round measures each model once, and
what is reported is the ratio of two models within a round, over the rounds. Every model lives in a process of its own,
of which one works at a time.
"""
import contextlib
import dataclasses
import datetime
import importlib
import itertools
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from .benchmark_worker import BenchmarkError, Settings, answer, parse_model

__all__ = ['BenchmarkError', 'Settings', 'Worker', 'measure', 'notes', 'table_rows']

KIND = 'timm-spa bench 1'
AS_BUILT = ' as built'  # behind the name of the base that is also measured without --reparam
# environment variables that affect speed, kept with the results
VARIABLES = ('CUDA_', 'KMP_', 'LD_PRELOAD', 'MALLOC_', 'OMP_', 'PYTORCH_')


class Worker:
    """A process that measures one model. It answers the requests of `benchmark_worker.answer`."""

    def __init__(self, model: str, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        # keep what models and compilers print out of stdout, where the table goes
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), os.dup2, (2, 1))

    def ask(self, what: str) -> Dict[str, Any]:
        """Sends a request and returns the answer. Raises BenchmarkError if it fails or the process dies."""
        try:
            return self.pool.submit(answer, what, self.model, self.settings).result()
        except BrokenProcessPool as e:
            raise BenchmarkError(
                f'{self.model}: the process died, probably out of memory with --batch-size {self.settings.batch_size}. '
                'Use a smaller one.') from e

    def close(self) -> None:
        """Ends the process."""
        self.pool.shutdown()


def measure(
        models: Sequence[str],
        settings: Settings,
        base: Optional[str] = None,
        command: str = '',
        progress: Callable[[str], None] = lambda message: None,
) -> Dict[str, Any]:
    """Measures models, named as for `parse_model`, in turn: A B C, A B C, ...

    One that is there twice shows how far equal models differ. `base` is the first if None. The record has, of what JSON
    knows, 'settings', 'environment', 'base', every round of every model, and what `table_rows` shows.
    """
    for module in settings.imports:
        try:
            importlib.import_module(module)
        except Exception as e:
            raise BenchmarkError(f'--import {module}: {type(e).__name__}: {e}') from e
    try:
        for model in models:
            parse_model(model)
    except ValueError as e:
        raise BenchmarkError(str(e)) from e
    base = models[0] if base is None else base
    if base not in models:
        raise BenchmarkError(f'--base {base!r} is not one of the models to measure: {", ".join(models)}.')
    if settings.device == 'cuda' and not torch.cuda.is_available():
        raise BenchmarkError(f'--device cuda: torch {torch.__version__} finds no CUDA device. Use --device cpu.')
    labels = [m + (f' #{models[:i].count(m) + 1}' if m in models[:i] else '') for i, m in enumerate(models)]

    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    jobs = [(label, model, settings) for label, model in zip(labels, models, strict=True)]
    if settings.reparam:
        jobs.append((f'{base}{AS_BUILT}', base, dataclasses.replace(settings, reparam=False)))
    entries: List[Dict[str, Any]] = [dict(model=label, rounds=[]) for label, _, _ in jobs]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(Worker(model, how))) for _, model, how in jobs]
        for worker, entry in zip(workers, entries, strict=True):
            progress(f'{entry["model"]}: warm-up')
            entry.update(worker.ask('prepare'))
        sequence = itertools.count()
        for number in range(1, settings.rounds + 1):
            progress(f'round {number} of {settings.rounds}')
            for worker, entry in zip(workers, entries, strict=True):
                entry['rounds'].append(dict(sequence=next(sequence), **worker.ask('measure')))
        for worker, entry in zip(workers, entries, strict=True):
            entry.update(worker.ask('memory'))

    about = [entry.pop('environment') for entry in entries][0]
    _summarise(entries, labels.index(base), settings.batch_size)
    return dict(
        kind=KIND, date=date, command=command, environment=about, settings=dataclasses.asdict(settings), base=base,
        variables={k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        models=entries)


def _summarise(entries: Sequence[Dict[str, Any]], base: int, batch_size: int) -> None:
    """Adds speed and ratio to each round, and their quartiles to each model."""
    for entry in entries:
        for r in entry['rounds']:
            r['images_per_second'] = batch_size * r['steps'] / r['seconds']
    for entry in entries:
        for r, of_base in zip(entry['rounds'], entries[base]['rounds'], strict=True):
            r['ratio'] = r['images_per_second'] / of_base['images_per_second']
        if entries[-1]['model'].endswith(AS_BUILT):
            for r, as_built in zip(entry['rounds'], entries[-1]['rounds'], strict=True):
                r['ratio_as_built'] = r['images_per_second'] / as_built['images_per_second']
        for key in [key for key in ('images_per_second', 'ratio', 'ratio_as_built') if key in entry['rounds'][0]]:
            values = [r[key] for r in entry['rounds']]
            quartiles = statistics.quantiles(values, method='inclusive') if len(values) > 1 else values * 3
            entry[key] = dict(median=quartiles[1], first_quartile=quartiles[0], third_quartile=quartiles[2])


def table_rows(record: Dict[str, Any]) -> List[List[str]]:
    """Returns a record of `measure` as rows of text, with a header."""
    ratios = [key for key in ('ratio', 'ratio_as_built') if key in record['models'][0]]
    titles = {'ratio': f'to {record["base"]}', 'ratio_as_built': f'to {record["base"]}{AS_BUILT}'}
    trains = record['settings']['mode'] == 'train'
    rows = [[
        'model', 'input', 'img/s', '(quartiles)', *(t for key in ratios for t in (titles[key], '(quartiles)')),
        *(['kept MiB/img'] if trains else []), 'peak MiB', 'parameters (M)', 'construction (s)']]
    for entry in record['models']:
        memory = entry['peak_memory']
        rows.append([
            entry['model'], 'x'.join(map(str, entry['input'])), *_figures(entry['images_per_second'], '.1f'),
            *(figure for key in ratios for figure in _figures(entry[key], '.3f')),
            *([f'{entry["kept_per_image"] / 2 ** 20:.1f}'] if trains else []),
            '-' if memory is None else f'{memory / 2 ** 20:.0f}',
            f'{entry["parameters"] / 1e6:.3f}', f'{entry["construction_seconds"]:.2f}'])
    return rows


def _figures(summary: Dict[str, float], form: str) -> Tuple[str, str]:
    return (
        format(summary['median'], form),
        f'({summary["first_quartile"]:{form}} to {summary["third_quartile"]:{form}})')


def notes(record: Dict[str, Any]) -> List[str]:
    """Returns lines that describe the settings and the environment of a record."""
    settings, about, entries = record['settings'], record['environment'], record['models']
    versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
    variables = ' '.join(f'{name}={value}' for name, value in record['variables'].items())
    compiled = f'compiled by {settings["compile"]}' if settings['compile'] else 'eager'
    layout = 'channels_last' if settings['channels_last'] else 'NCHW'
    dtype = ('autocast ' if settings['amp'] else '') + settings['dtype']
    mode = settings['mode'] + (' reparameterized' if settings.get('reparam') else '')
    breaks = [f'{e["model"]} {e["graph_breaks"]}' for e in entries if e['graph_breaks']]
    return [
        f'img/s and its ratio to {record["base"]} in the same round: median, first and third quartile of '
        f'{settings["rounds"]} rounds of at least {settings["min_seconds"]:g} s.',
        *(['Kept: tensors that the forward pass keeps for the backward pass, per image, without parameters.']
          if settings['mode'] == 'train' else []),
        f'Peak: {entries[0]["peak_memory_is"]}.',
        f'{mode}, {compiled}, {dtype}, {layout}, batch {settings["batch_size"]}, {settings["device"]}.',
        f'{about["hardware"]}; Python {about["python"]}, {versions}; {record["date"]}.',
        *([f'With {variables}.'] if variables else []),
        *([f'The compiler broke the graph of: {", ".join(breaks)} times.'] if breaks else []),
    ]
