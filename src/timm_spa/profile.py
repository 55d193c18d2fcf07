"""Parameters, multiply-adds, activations and memory of models.

`python -m timm_spa.profile` counts all models and gates and writes models.json, which `timm-spa list` reads. It keeps
the speeds of gates, or replaces them by those of `--speeds FILE ...`, records of `timm-spa bench ... --out FILE`.
"""
import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .checkpoints.files import replacing
from .models import GATES, list_models
from .models._gate_table import reads_block_input

__all__ = ['ModelCost', 'bytes_kept_for_backward', 'count_cost', 'describe', 'describe_gate', 'listed_gates',
           'recorded_speeds']

GATED_MODEL = 'resnet50'
LIST = Path(__file__).parent / 'models.json'


class ModelCost(NamedTuple):
    """Cost of a model for one image.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-adds of convolutions and linear layers.
        activations: Number of output values of convolutions and linear layers, as in timm's model cards.
    """
    parameters: int
    macs: int
    activations: int


def count_cost(model_name: str, input_size: Optional[Sequence[int]] = None, **kwargs: Any) -> ModelCost:
    """Counts the cost of a model on the meta device, without memory for its weights.

    Args:
        model_name: Name of a timm model.
        input_size: Channels, height and width of the image. Defaults to the model's input size.
        **kwargs: Arguments of `timm.create_model`.
    """
    model = timm.create_model(model_name, device=torch.device('meta'), **kwargs).eval()
    activations: List[int] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output: activations.append(output.numel()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(1, *(input_size or model.pretrained_cfg['input_size']), device='meta'))
    parameters = sum(p.numel() for p in model.parameters())
    return ModelCost(parameters, counter.get_total_flops() // 2, sum(activations))


def bytes_kept_for_backward(net: nn.Module, forward: Callable[[], Any]) -> int:
    """Counts the bytes that a forward pass keeps for the backward pass.

    Tensors that share memory count once. Parameters do not count, as they are kept in any case. The figure is the same
    on every machine, also on the meta device, as long as torch chooses the same formulas.

    Args:
        net: Network whose parameters are left out.
        forward: Runs the forward pass with gradients enabled.
    """
    # by identity, as storages on the meta device have no address; the list holds them, so that no id is reused
    parameters = [p.untyped_storage() for p in net.parameters()]
    left_out = {id(storage) for storage in parameters}
    kept: Dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if id(storage) not in left_out:
            kept[id(storage)] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in kept.values())


def describe(model_name: str) -> Dict[str, Any]:
    """Returns the row of a model in models.json."""
    cost, cfg = count_cost(model_name), timm.get_pretrained_cfg(model_name, allow_unregistered=False)
    return dict(
        parameters=cost.parameters, macs=cost.macs, input='x'.join(map(str, cfg.input_size[1:])), tag=cfg.tag,
        tags=len(timm.list_pretrained(f'{model_name}.*')))


def listed_gates() -> List[str]:
    """Returns the names of the gates in models.json, those that `add_attention` takes."""
    return [gate for gate in GATES if not reads_block_input(gate)]


def describe_gate(gate: str) -> Dict[str, Any]:
    """Returns the row of a gate in models.json: the cost of GATED_MODEL with it, and what a training step keeps."""
    kwargs: Any = dict(base=GATED_MODEL, gate=gate)
    cost = count_cost('gated', **kwargs)
    with torch.device('meta'):
        model: Any = timm.create_model('gated', **kwargs).train()
        images = torch.empty(2, *model.pretrained_cfg['input_size'])  # batch norm needs two images
    kept = bytes_kept_for_backward(model, lambda: model(images).sum())
    return dict(parameters=cost.parameters, macs=cost.macs, kept=kept // len(images))


def recorded_speeds(records: Sequence[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Returns the section 'speeds' of models.json: how fast GATED_MODEL is with each gate, relative to without.

    Args:
        records: Records of `timm_spa.benchmark.measure` of GATED_MODEL and `gated`; several of a mode are merged.

    Raises:
        ValueError: Records of a mode differ in settings, or GATED_MODEL is not the baseline.
    """
    speeds: Dict[str, Dict[str, Any]] = {}
    for record in records:
        settings, about = record['settings'], record['environment']
        if record['base'] != GATED_MODEL:
            raise ValueError(f'The baseline of a record must be {GATED_MODEL}, got {record["base"]!r}.')
        versions = ', '.join(f'{name} {about["versions"][name]}' for name in ('torch', 'timm'))
        setting = dict(
            measured=f'{about["hardware"]}, {versions}, {record["date"][:10]}', batch_size=settings['batch_size'],
            channels_last=settings['channels_last'], dtype=settings['dtype'], compile=settings['compile'])
        speed = speeds.setdefault(settings['mode'], dict(setting, ratios={}))
        if any(speed[key] != value for key, value in setting.items()):
            raise ValueError(f'The records of mode {settings["mode"]!r} differ in their settings or environment.')
        for entry in record['models']:
            gate = entry['model'].partition('gate=')[2]  # 'gated base=resnet50 gate=se'
            speed['ratios'][gate or 'none'] = round(entry['ratio']['median'], 3)
    return speeds


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Writes models.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--speeds', nargs='+', metavar='FILE', help='records of timm-spa bench')
    args = parser.parse_args(argv)
    sections = {
        'models': {name: describe(name) for name in list_models()},
        'gates': {name: describe_gate(name) for name in listed_gates()},
        'speeds': recorded_speeds([json.loads(Path(file).read_text(encoding='utf-8')) for file in args.speeds])
        if args.speeds else json.loads(LIST.read_text(encoding='utf-8'))['speeds']}
    text = ',\n'.join(f'"{section}": {{\n' + ',\n'.join(
        f'  {json.dumps(name)}: {json.dumps(row)}' for name, row in rows.items()) + '\n}'
        for section, rows in sections.items())
    with replacing(LIST) as partial:
        partial.write_text('{' + text + '}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
