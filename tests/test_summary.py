"""The end of the output of pytest."""
import runpy
import types
from pathlib import Path

# by path: the tests of other tools have a conftest.py too
pytest_terminal_summary = runpy.run_path(str(Path(__file__).with_name('conftest.py')))['pytest_terminal_summary']


def test_skips_are_grouped_by_reason(capsys):
    def skipped(reason):
        return types.SimpleNamespace(longrepr=('file.py', 1, reason))

    reports = [skipped(f'Skipped: {reason}') for reason in ('needs a GPU', 'needs x', 'needs a GPU')]
    reports.append(skipped('long ' * 100))
    pytest_terminal_summary(types.SimpleNamespace(stats=dict(skipped=reports), write_line=print))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ['skipped 2: needs a GPU', 'skipped 1: needs x']
    assert len(lines) == 3
    assert len(lines[2]) < 105
    pytest_terminal_summary(types.SimpleNamespace(stats={}, write_line=print))
    assert capsys.readouterr().out == ''
