"""Tests of other people's tools with our nets, and the table that is made of a run of them: `make hosts`.

A test of a host is marked `host(name, distribution, catch=...)` and takes `kind`, one of `nets.KINDS`; what works
for some kinds only is an expected failure for the others. What works for no kind, the plain net included, is a test
marked `limit(text, distribution)`, which expects the error.
"""
import datetime
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import pytest
from nets import KINDS

TABLE = """<!-- written by `make hosts` -->
| host | version | SPA | `add_attention` | plain | mind |
|---|---|---|---|---|---|
{rows}

{date}, on Linux, Python {python}, timm {timm}, torch {torch}, without a GPU.

## What fails for plain nets too

{limits}
"""


def pytest_addoption(parser):
    parser.addoption('--table', type=Path, help='file to write the table of hosts to, if no test fails or is skipped')


def pytest_configure(config):
    config.addinivalue_line('markers', 'host(name, distribution, catch): a row of the table of hosts')
    config.addinivalue_line('markers', 'limit(text, distribution): what fails for plain nets too')
    config.pluginmanager.register(Table(config), 'table of hosts')


def pytest_collection_modifyitems(items):
    absent = importlib.util.find_spec('transformers') is None
    for item in items:
        if item.path.parent.name != 'hosts':
            continue
        if absent:
            item.add_marker(pytest.mark.skip(reason='the hosts are not installed here: `make hosts`'))
        for name in ('host', 'limit'):  # reports, and not marks, come back from the processes of pytest-xdist
            marker = item.get_closest_marker(name)
            if marker:
                about = [*marker.args, marker.kwargs.get('catch', ''), item.callspec.params['kind']]
                item.user_properties.append((name, about))


class Table:
    """Collects what the reports say of each host."""

    def __init__(self, config):
        self.path = None if hasattr(config, 'workerinput') else config.getoption('--table', None)
        self.rows, self.limits, self.complete = {}, {}, True

    def pytest_runtest_logreport(self, report):
        fails_as_expected = hasattr(report, 'wasxfail') and report.skipped
        self.complete &= report.passed or fails_as_expected
        if report.when != 'call':
            return
        for name, about in report.user_properties:
            if name == 'host':
                host, distribution, catch, kind = about
                cells = self.rows.setdefault((host, distribution, catch), {})
                cells[kind] = cells.get(kind, True) and report.passed
            elif name == 'limit':
                self.limits[about[0]] = about[1]

    def pytest_sessionfinish(self, exitstatus):
        if self.path and exitstatus == 0 and self.complete:
            version = importlib.metadata.version
            rows = sorted(self.rows.items(), key=lambda row: row[0][0].lower())
            self.path.write_text(TABLE.format(
                rows='\n'.join(
                    f'| {host} | {version(distribution)} | '
                    f'{" | ".join({True: "yes", False: "no"}.get(cells.get(kind), "") for kind in KINDS)} | {catch} |'
                    for (host, distribution, catch), cells in rows),
                date=datetime.date.today().isoformat(), python=platform.python_version(), timm=version('timm'),
                torch=version('torch'),
                limits='\n'.join(f'- {text} ({name} {version(name)})' for text, name in sorted(self.limits.items()))),
                encoding='utf-8')

    def pytest_terminal_summary(self, terminalreporter):
        if self.path:
            terminalreporter.write_line(
                f'{self.path}: {"written" if self.complete else "left as it was, for a test failed or was skipped"}')
