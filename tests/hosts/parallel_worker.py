"""Two processes on one machine that share a batch; the first saves what the net computed."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nets import KINDS, images, make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel


def distributed_data_parallel(net):
    hosted = DistributedDataParallel(net)
    return hosted, lambda grad: grad, 'module.'


def fully_sharded_2(net):
    mesh = init_device_mesh('cpu', (2,))
    for block in [*net.layer1, *net.layer2, *net.layer3, *net.layer4]:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh), lambda grad: grad.full_tensor(), ''


def fully_sharded_1(net):
    hosted = FullyShardedDataParallel(net, use_orig_params=True)
    return hosted, lambda grad: grad, '_fsdp_wrapped_module.'


HOSTS = {'ddp': distributed_data_parallel, 'fsdp2': fully_sharded_2, 'fsdp1': fully_sharded_1}


def work(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    results = {}
    for kind in KINDS:
        for name, wrap in HOSTS.items():
            try:
                net, full, prefix = wrap(make(kind))
                logits = net(images(4)[2 * rank:2 * rank + 2])
                logits.square().mean().backward()
                gradients = {n.removeprefix(prefix): full(p.grad) for n, p in net.named_parameters()}
                results[kind, name] = dict(logits=logits.detach(), gradients=gradients)
            except RuntimeError as e:
                results[kind, name] = str(e)
    if rank == 0:
        torch.save(results, Path(folder) / 'results.pt')
    dist.destroy_process_group()


if __name__ == '__main__':
    work(int(sys.argv[1]), sys.argv[2])
