"""Prints the size and cost columns of the paper's tables next to the counts of our models."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
import torch.nn as nn
from timm.layers import SelectAdaptivePool2d

from timm_spa import SpatialPyramidAttention
from timm_spa.profile import count_cost
from timm_spa_cli._table import print_table

__all__ = ['PaperRow', 'TABLES', 'paper_flops', 'table_rows']

NOTE = """\
"paper": figures in the paper. "authors": counted in the authors' code. "ours": counted now.
The paper's FLOPs are the multiply-adds of convolutions and linear layers, plus 1 per output value of a convolution with
a bias, 2 per input value of a norm layer, and 1 per value of a ReLU or input value of a pooling layer. Gates, residual
sums and resizing are not counted. "ours" uses the same rules. "GMACs" counts convolutions and linear layers only.
Table VI lists the trained parameters of whole detectors with a frozen stem and first stage. Its rows here are the
differences between a backbone and ResNet-50 in the same detector."""


class PaperRow(NamedTuple):
    """One row of a table.

    Attributes:
        system: Name in the paper.
        model: Name of the model in this package or timm.
        parameters: The paper's parameters, in millions.
        flops: The paper's FLOPs, in 1e9.
        authors: Parameters and FLOPs of the authors' code, if it exists.
        kwargs: Arguments of the model.
    """
    system: str
    model: str
    parameters: Optional[float] = None
    flops: Optional[float] = None
    authors: Optional[Sequence[int]] = None
    kwargs: Dict[str, Any] = {}


TABLES: Dict[str, List[PaperRow]] = {
    'III': [
        PaperRow('ResNet50', 'resnet50', 25.557, 4.122, (25_557_032, 4_121_924_096)),
        PaperRow('SE-ResNet50', 'seresnet50', 28.088, 4.130),
        PaperRow('GE-ResNet50', 'ge_resnet50', 25.557, 4.127),
        PaperRow('CBAM-ResNet50', 'cbam_resnet50', 28.090, 4.139),
        PaperRow('SPA-ResNet50', 'spa_resnet50', 28.074, 4.262, (28_073_912, 4_261_853_200)),
        PaperRow('MobileNetV2', 'mobilenetv2_100', 3.505, 0.320),
        PaperRow('SE-MobileNetV2', 'se_mobilenetv2', 3.563, 0.321),
        PaperRow('GE-MobileNetV2', 'ge_mobilenetv2', 3.555, 0.322),
        PaperRow('CBAM-MobileNetV2', 'cbam_mobilenetv2', 3.565, 0.324),
        PaperRow('SPA-MobileNetV2', 'spa_mobilenetv2', 3.562, 0.325, (3_562_227, 324_770_356)),
    ],
    # the paper does not list size and cost here; the authors' counter printed FLOPs to five digits
    'V': [
        PaperRow('[1, 2]', 'spa_resnet50', None, None, (28_073_896, 4_143_000_000), dict(pyramid_sizes=(1, 2))),
        PaperRow('[1, 2, 4]', 'spa_resnet50', None, None, (28_073_912, 4_178_800_000), dict(pyramid_sizes=(1, 2, 4))),
        PaperRow('[1, 4, 7]', 'spa_resnet50', None, None, (28_073_912, 4_261_853_200), dict(pyramid_sizes=(1, 4, 7))),
        PaperRow(
            '[1, 2, 4, 7]', 'spa_resnet50', None, None, (28_073_928, 4_267_400_000),
            dict(pyramid_sizes=(1, 2, 4, 7))),
    ],
    # parameters added by the backbone: the difference of two detectors, to two decimals
    'VI': [
        PaperRow('RetinaNet, SE-ResNet50', 'seresnet50', 2.51),
        PaperRow('RetinaNet, SPA-ResNet50', 'spa_resnet50', 2.51),
        PaperRow('Cascade R-CNN, GC-ResNet50', 'gc_resnet50', 2.52),
        PaperRow('Cascade R-CNN, SPA-ResNet50', 'spa_resnet50', 2.50),
    ],
}


def table_rows(table: str) -> List[List[str]]:
    """Counts the models of a table.

    Args:
        table: Roman number of the table, a key of `TABLES`.

    Returns:
        Rows of text, a header first.
    """
    rows = [[
        f'table {table}', 'model', 'params M: paper', 'authors', 'ours', 'diff',
        'FLOPs G: paper', 'authors', 'ours', 'diff', 'GMACs']]
    base = _trained_in_a_detector('resnet50') if table == 'VI' else 0
    for row in TABLES[table]:
        if table == 'VI':
            added = _trained_in_a_detector(row.model) - base
            rows.append([
                row.system, row.model, _number(row.parameters), '-', _number(added, 1e6),
                f'{added / 1e6 - (row.parameters or 0):+.3f}', *('-' * 5)])
            continue
        cost = count_cost(row.model, **row.kwargs)
        flops = paper_flops(row.model, cost.macs, **row.kwargs)
        authors_parameters, authors_flops = row.authors or (None, None)
        rows.append([
            row.system, row.model,
            _number(row.parameters), _number(authors_parameters, 1e6), _number(cost.parameters, 1e6),
            _difference(cost.parameters, authors_parameters, row.parameters and row.parameters * 1e6),
            _number(row.flops), _number(authors_flops, 1e9), _number(flops, 1e9),
            _difference(flops, authors_flops, row.flops and row.flops * 1e9),
            _number(cost.macs, 1e9),
        ])
    return rows


def paper_flops(model_name: str, macs: int, **kwargs: Any) -> int:
    """Counts FLOPs as the paper does, see `NOTE`.

    Args:
        model_name: Name of a model in timm.
        macs: Multiply-adds of the model.
        **kwargs: Arguments of `timm.create_model`.

    Returns:
        The count, for one image of the model's input size.
    """
    model = timm.create_model(model_name, device='meta', **kwargs).eval()
    counts: List[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            counts.append(2 * inputs[0].numel())
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            counts.append(output.numel())
        elif isinstance(module, nn.Conv2d):
            counts.append(output.numel() if module.bias is not None else 0)
        elif isinstance(module, SpatialPyramidAttention):
            # every size pools the source, after the channel matcher
            source = inputs[1] if module.reads_block_input else inputs[0]
            channels = source.shape[1] if isinstance(module.matcher, nn.Identity) else inputs[0].shape[1]
            counts.append(len(module.pyramid_sizes) * channels * source.shape[2] * source.shape[3])
        else:
            counts.append(inputs[0].numel())

    pooling = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, SelectAdaptivePool2d)
    counted = (nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.ReLU6, nn.Conv2d, SpatialPyramidAttention, *pooling)
    inside_pooling = {
        id(child) for m in model.modules() if isinstance(m, SelectAdaptivePool2d) for child in m.modules()
        if child is not m}
    for module in model.modules():
        if isinstance(module, counted) and id(module) not in inside_pooling:
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return macs + sum(counts)


def _trained_in_a_detector(model_name: str) -> int:
    model = timm.create_model(model_name, device='meta')
    frozen = ('conv1.', 'bn1.', 'layer1.', 'fc.')
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(frozen))


def _number(value: Optional[float], unit: float = 1) -> str:
    return '-' if value is None else f'{value / unit:.3f}'


def _difference(ours: float, authors: Optional[float], paper: Optional[float]) -> str:
    """Returns the relative difference to the authors' exact count, or else to the paper's rounded figure."""
    reference = authors or paper
    return '-' if not reference else f'{ours / reference - 1:+.2%}'


def main() -> None:
    """Prints every table."""
    for table in TABLES:
        print_table(table_rows(table), right_aligned=range(2, 11))
        print()
    print(NOTE)


if __name__ == '__main__':
    main()
