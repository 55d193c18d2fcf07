"""Processes that time files of `timm-spa export`, one process for each file.

Threads of a runtime keep running for a while after a call, so runtimes that share a process slow each other down. A
process is stopped by a signal while another one is measured.
"""
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Sequence

SECONDS = 0.4  # of one measurement
RUNTIMES = ('pytorch', 'onnxruntime', 'openvino', 'openvino-float32')  # 'openvino' computes at its default precision


class Worker:
    """A process that holds a file open.

    Args:
        runtime: One of `RUNTIMES`.
        path: File; for PyTorch, 'NAME built', 'NAME fused' or 'NAME compiled'.
        threads: Number of threads.
        shape: Shape of the input.
    """

    def __init__(self, runtime: str, path: str, threads: int, shape: Sequence[int]) -> None:
        command = [sys.executable, __file__, json.dumps([runtime, str(path), threads, list(shape)])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        self.about = self._answer()
        self.calls = 1
        for _ in range(2):  # the first measurement includes the warm-up
            self.calls = max(1, round(SECONDS / self.measure()))

    def _answer(self) -> Any:
        line: Any = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f'The process of {self.process.args!r} ended.')
        os.kill(self.process.pid, signal.SIGSTOP)
        return json.loads(line)

    def measure(self) -> float:
        """Returns the mean seconds per call."""
        os.kill(self.process.pid, signal.SIGCONT)
        print(self.calls, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def measure_rounds(workers: Dict[Any, Worker], rounds: int) -> Dict[Any, List[float]]:
    """Returns the seconds per call of each round. A round measures each worker once, in random order."""
    seconds: Dict[Any, List[float]] = {key: [] for key in workers}
    order, generator = list(workers), random.Random(0)
    for i in range(rounds):
        generator.shuffle(order)
        for key in order:
            seconds[key].append(workers[key].measure())
        print(f'round {i + 1} of {rounds}', file=sys.stderr)
    return seconds


def speed(seconds: Sequence[float], base: Sequence[float]) -> List[float]:
    """Returns the quartiles of the speed relative to a base in the same round."""
    return statistics.quantiles([b / s for s, b in zip(seconds, base, strict=True)], n=4, method='inclusive')


def _open(runtime: str, path: str, threads: int, x: Any) -> Callable[[], Any]:
    if runtime == 'onnxruntime':
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda: session.run(None, {session.get_inputs()[0].name: x})
    if runtime.startswith('openvino'):
        import openvino

        options = {'INFERENCE_NUM_THREADS': threads}
        if runtime == 'openvino-float32':
            options['INFERENCE_PRECISION_HINT'] = 'f32'
        compiled = openvino.Core().compile_model(path, 'CPU', options)
        return lambda: compiled(x)
    import timm
    import torch

    import timm_spa  # noqa: F401
    from timm_spa.predict import for_inference

    torch.set_num_threads(threads)
    name, form = path.split()
    model = timm.create_model(name, pretrained=True).eval()
    if form != 'built':
        model = for_inference(model)
    if form == 'compiled':
        model = torch.compile(model)
    x = torch.from_numpy(x)

    def call() -> Any:
        with torch.inference_mode():
            return model(x)

    return call


def main() -> None:
    """Opens a file, and answers each number of calls on the standard input with the seconds per call."""
    import numpy

    runtime, path, threads, shape = json.loads(sys.argv[1])
    call = _open(runtime, path, threads, numpy.random.default_rng(0).standard_normal(shape, numpy.float32))
    for _ in range(3):
        call()
    print(json.dumps(runtime), flush=True)
    for line in sys.stdin:
        call()  # wakes the threads of the runtime
        start = time.perf_counter()
        for _ in range(int(line)):
            call()
        print((time.perf_counter() - start) / int(line), flush=True)


if __name__ == '__main__':
    main()
