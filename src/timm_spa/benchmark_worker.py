"""One model of `timm-spa bench`, in a process of its own, measured whenever it is asked.

A process for each model keeps their peak memory apart, and their compiled code: models that share the code of a block
would otherwise use up the recompilations that torch allows for it, and from then on run eagerly without a word.
"""
import argparse
import dataclasses
import importlib
import math
import os
import shlex
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import ParseKwargs, reparameterize_model
from torch.utils.benchmark import Timer

from ._errors import TimmSpaError
from ._names import check_model_name
from .environment import environment
from .layers.fused_branch import CONVS, NORMS, FusedBranch, merge_norms
from .profile import bytes_kept_for_backward

__all__ = [
    'BenchmarkError', 'Settings', 'Workload', 'answer', 'bytes_kept_for_backward', 'parse_model', 'reparameterized']


class BenchmarkError(TimmSpaError, RuntimeError):
    """A model could not be measured. The message names the model."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a benchmark, equal for all models.

    Attributes:
        mode: 'infer', a forward pass, or 'train': forward pass, cross-entropy, backward pass and a step of SGD.
        dtype: Data type of weights and input; with `amp`, the one that autocast computes in.
        amp: Weights and input stay float32, autocast chooses where to compute in `dtype`.
        channels_last: Memory layout of weights and input.
        compile: Backend of `torch.compile`; None measures the model as it is.
        reparam: Measure the form for inference that `timm.utils.reparameterize_model` makes. In a net without blocks
            that have one, the norm layers are merged into the convolutions.
        batch_size: Images at a time.
        img_size: Height and width of the input; those of the model's configuration if None.
        device: 'cpu' or 'cuda'.
        threads: CPU threads; torch's own choice if None.
        rounds: Times that every model is measured.
        warmup: Steps of each model before its first measurement.
        min_seconds: Least duration of one measurement; it takes as many steps as that needs.
        imports: Modules to import first, which register further models with timm.

    Raises:
        ValueError: The duration is no number from 0 on, or two arguments contradict each other.
    """
    mode: str = 'infer'
    dtype: str = 'float32'
    amp: bool = False
    channels_last: bool = False
    compile: Optional[str] = None
    reparam: bool = False
    batch_size: int = 32
    img_size: Optional[int] = None
    device: str = 'cpu'
    threads: Optional[int] = None
    rounds: int = 10
    warmup: int = 5
    min_seconds: float = 1.0
    imports: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds < math.inf:
            raise ValueError(f'--min-seconds must be a number from 0 on, got {self.min_seconds}.')
        if self.amp and self.dtype == 'float32':
            raise ValueError('--amp computes in half precision. Use it with --dtype bfloat16 or float16.')
        if self.reparam and self.mode == 'train':
            raise ValueError('--reparam makes a form for inference. Use it with --mode infer.')


def parse_model(text: str) -> Tuple[str, Dict[str, Any]]:
    """Returns name and arguments of e.g. 'spa_resnet50 pyramid_sizes=1,2', read as timm reads its --model-kwargs."""
    name, *words = shlex.split(text) or ['']
    check_model_name(name, ValueError)
    wrong = [w for w in words if w.count('=') != 1]
    if wrong:
        raise ValueError(f'{text!r}: {wrong[0]!r} is not of the form key=value.')
    parsed = argparse.Namespace()
    ParseKwargs([], 'kwargs')(None, parsed, words)
    return name, parsed.kwargs


def reparameterized(net: nn.Module, images: torch.Tensor) -> nn.Module:
    """Fuses a model in eval mode for inference, or merges the norm layers of a model without fused blocks.

    The images are to find out with which norm layer follows which convolution, and that both forms compute the same.
    """
    net = reparameterize_model(net, inplace=True)
    if any(isinstance(m, FusedBranch) for m in net.modules()):
        return net
    made: Dict[int, Tuple[str, torch.Tensor]] = {}  # keeps the map alive, so that its id is not reused
    pairs: List[Tuple[str, str]] = []

    def listen(name: str, module: nn.Module) -> Any:
        if type(module) in CONVS:
            return module.register_forward_hook(lambda m, args, out: made.update({id(out): (name, out)}))
        return module.register_forward_hook(
            lambda m, args, out: pairs.append((made[id(args[0])][0], name)) if id(args[0]) in made else None)

    with torch.inference_mode():
        handles = [listen(name, m) for name, m in net.named_modules() if type(m) in (*CONVS, *NORMS)]
        expected = net(images)
        for handle in handles:
            handle.remove()
        for conv, norm in pairs:
            merged = [*merge_norms([net.get_submodule(conv), net.get_submodule(norm)]), nn.Identity()]
            for name, module in zip((conv, norm), merged, strict=False):
                parent, _, child = name.rpartition('.')
                setattr(net.get_submodule(parent), child, module)
        if not torch.allclose(net(images), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
            raise RuntimeError('merging the norm layers changed the outputs of the model.')
    return net


class Workload:
    """One model on its device with an input. `about` is its description for the record."""

    def __init__(self, model: str, settings: Settings, make: Callable[..., Any] = timm.create_model) -> None:
        self.settings = settings
        self._device = torch.device(settings.device)
        name, kwargs = parse_model(model)
        start = time.perf_counter()
        net = make(name, **kwargs)
        seconds = time.perf_counter() - start
        channels, height, width = net.pretrained_cfg['input_size']
        size = (channels, settings.img_size or height, settings.img_size or width)
        self.about = dict(
            input=size, parameters=sum(p.numel() for p in net.parameters()), construction_seconds=seconds)
        self._half = getattr(torch, settings.dtype)
        stored = torch.float32 if settings.amp else self._half
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        net = net.to(device=self._device, dtype=stored, memory_format=layout)
        self.input = torch.randn(settings.batch_size, *size, device=self._device, dtype=stored)
        self.input = self.input.contiguous(memory_format=layout)
        net.train(settings.mode == 'train')
        if settings.mode == 'train':  # else it would keep the weights that fusing replaces
            self._target = torch.randint(net.num_classes, (settings.batch_size,), device=self._device)
            # a step of length 0 costs what any step costs, and leaves the same work for every round
            self._optimizer = torch.optim.SGD(net.parameters(), lr=0., momentum=0.9)
        if settings.reparam:
            net = reparameterized(net, self.input[:1])
        self._built = net
        self._net: Callable[[torch.Tensor], torch.Tensor] = net
        if settings.compile:
            # not public: its name since torch 2.7, the older one, and none if it is gone
            for option in ('fail_on_recompile_limit_hit', 'fail_on_cache_limit_hit'):
                if hasattr(torch._dynamo.config, option):
                    setattr(torch._dynamo.config, option, True)
            self._net = torch.compile(net, backend=settings.compile)
        self._graphs = 0

    def step(self) -> None:
        """Runs one step: a forward pass or a training step."""
        if self.settings.mode == 'infer':
            with torch.inference_mode(), self._autocast():
                self._net(self.input)
            return
        self._optimizer.zero_grad()
        self._loss().backward()
        self._optimizer.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._half, enabled=self.settings.amp)

    def _loss(self) -> torch.Tensor:
        with self._autocast():
            return F.cross_entropy(self._net(self.input), self._target)

    def warm_up(self) -> Dict[str, Any]:
        """Runs the first steps, which compile and choose kernels. Returns the numbers of graphs and graph breaks."""
        for _ in range(1 + self.settings.warmup):
            self.step()
        if self._device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()  # leave out the memory that choosing kernels took
        self._graphs, breaks = self._compiled()
        return dict(graphs=self._graphs, graph_breaks=breaks)

    def measure(self) -> Dict[str, Any]:
        """Runs steps for at least `min_seconds`, after some untimed ones. Returns steps and seconds."""
        timer = Timer('step()', globals=dict(step=self.step), num_threads=torch.get_num_threads())
        found = timer.blocked_autorange(min_run_time=max(self.settings.min_seconds, 1e-6))
        if self._compiled()[0] != self._graphs:
            raise RuntimeError('the model was recompiled after its warm-up, so the timing is invalid; raise --warmup')
        return dict(steps=len(found.raw_times) * found.number_per_run, seconds=sum(found.raw_times))

    def memory(self) -> Dict[str, Any]:
        """Returns memory in bytes: the peak, None if unknown, and what one image keeps for the backward pass."""
        kept = None
        if self.settings.mode == 'train':
            kept = bytes_kept_for_backward(self._built, self._loss) / self.settings.batch_size
        if self._device.type == 'cuda':
            return dict(
                kept_per_image=kept, peak_memory=torch.cuda.max_memory_allocated(),
                peak_memory_is='torch.cuda.max_memory_allocated, since the warm-up')
        peak = None
        if os.path.exists('/proc/self/status'):
            # getrusage's figure would be no less than the peak of the process that started this one
            with open('/proc/self/status') as f:
                peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM:'))
        return dict(
            kept_per_image=kept, peak_memory=peak,
            peak_memory_is='peak RSS of its process, with Python, torch and compilation')

    def _compiled(self) -> Tuple[int, int]:
        if not self.settings.compile:
            return 0, 0
        counters = torch._dynamo.utils.counters
        return counters['stats']['unique_graphs'], sum(counters['graph_break'].values())


_workload: Any = None  # of this process


def answer(what: str, model: str, settings: Settings) -> Dict[str, Any]:
    """Handles a request in the process of a model: to 'prepare' it, or a method of its `Workload`."""
    try:
        return _prepare(model, settings) if what == 'prepare' else getattr(_workload, what)()
    except Exception as e:  # many of torch's exceptions cannot be pickled
        text = str(e).strip()
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            cause = f'out of memory with --batch-size {settings.batch_size}.'
        elif type(e).__name__ == 'FailOnRecompileLimitHit':
            cause = 'it was compiled so often that torch would have gone on eagerly (its recompilation limit).'
        else:
            cause = f'{type(e).__name__}: {text.splitlines()[0] if text else "no message"}'
        raise BenchmarkError(f'{model}: {cause}') from None


def _prepare(model: str, settings: Settings) -> Dict[str, Any]:
    global _workload
    for module in settings.imports:
        importlib.import_module(module)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.device == 'cuda':
        torch.backends.cudnn.benchmark = True  # as timm's scripts have it
    _workload = Workload(model, settings)
    return dict(
        _workload.about, **_workload.warm_up(), threads=torch.get_num_threads(),
        environment=environment(('timm_spa', 'timm', 'torch'), settings.device))
