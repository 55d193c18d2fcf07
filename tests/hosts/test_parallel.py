"""DDP and FSDP2 over two processes: the logits of each, and the gradient of the whole batch."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import KINDS, check_backward, images, make

pytestmark = [pytest.mark.slow, pytest.mark.parametrize('kind', KINDS)]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """By kind and host, from one run of two processes: to start them takes the most time."""
    folder = tmp_path_factory.mktemp('parallel')
    worker = Path(__file__).with_name('parallel_worker.py')
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return torch.load(folder / 'results.pt', weights_only=True)


def check(result, kind):
    assert isinstance(result, dict), result
    net = make(kind)
    torch.testing.assert_close(result['logits'], net(images(4)[:2]).detach())
    check_backward(net, net(images(4)).square().mean(), kind)
    expected = {name: p.grad for name, p in net.named_parameters()}
    torch.testing.assert_close(result['gradients'], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.host('DistributedDataParallel', 'torch')
def test_ddp(kind, results):
    check(results[kind, 'ddp'], kind)


@pytest.mark.host('FSDP2, fully_shard', 'torch')
def test_fsdp2(kind, results):
    check(results[kind, 'fsdp2'], kind)


@pytest.mark.limit('FSDP1 (`FullyShardedDataParallel`) on a CPU', 'torch')
def test_fsdp1(kind, results):
    assert 'needs a non-CPU accelerator' in results[kind, 'fsdp1']
