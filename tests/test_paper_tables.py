"""Sizes and costs of our models, compared with the paper's tables."""
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from timm_spa.profile import count_cost

paper_tables = SimpleNamespace(**runpy.run_path(
    str(Path(__file__).parent.parent / 'train_scripts' / 'paper_tables.py')))
TABLES = paper_tables.TABLES


def test_tables(capsys):
    """Parameters and FLOPs of the paper, of the authors' code and of our models agree to three decimals."""
    paper_tables.main()
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith('SPA-')}
    assert rows['SPA-ResNet50'][2:9] == ['28.074', '28.074', '28.074', '+0.00%', '4.262', '4.262', '4.262']
    assert rows['SPA-MobileNetV2'][2:5] == ['3.562', '3.562', '3.562']
    assert rows['SPA-MobileNetV2'][6:9] == ['0.325', '0.325', '0.325']
    for table in ('table III', 'table V', 'table VI'):
        assert table in out


@pytest.mark.parametrize('row', [
    pytest.param(row, marks=[] if row.authors else pytest.mark.slow)
    for rows in TABLES.values() for row in rows if row.flops or row.authors])
def test_counts_match_the_paper(row):
    cost = count_cost(row.model, **row.kwargs)
    flops = paper_tables.paper_flops(row.model, cost.macs, **row.kwargs)
    if row.parameters:
        assert round(cost.parameters / 1e6, 3) == pytest.approx(row.parameters, abs=0.0011)
    if row.flops:
        assert flops / 1e9 == pytest.approx(row.flops, rel=0.005)
    if row.authors:
        assert cost.parameters == row.authors[0]
        assert flops == pytest.approx(row.authors[1], rel=3e-4)
