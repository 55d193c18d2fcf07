"""Tests of other tools ("hosts") with our models, and the table of their results: `make hosts`.

A test of a host is marked `host(name, distribution, catch=...)` and takes `kind`, one of `networks.KINDS`. A kind that
the host does not support is an expected failure. A test marked `limit(text, distribution)` expects an error for every
kind, including the plain model.
"""
import datetime
import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import pytest
from networks import KINDS

TABLE = """<!-- written by `make hosts` -->
| host | version | SPA | `add_attention` | plain | note |
|---|---|---|---|---|---|
{rows}

{date}, on Linux, Python {python}, timm {timm}, torch {torch}, without a GPU.

## Failures that also occur with the plain model

{limits}
"""


def pytest_addoption(parser):
    parser.addoption('--table', type=Path, help='file for the table of hosts, written if no test fails or is skipped')


def pytest_configure(config):
    config.addinivalue_line('markers', 'host(name, distribution, catch): a row of the table of hosts')
    config.addinivalue_line('markers', 'limit(text, distribution): a failure that also occurs with the plain model')
    config.pluginmanager.register(Table(config), 'table of hosts')


def pytest_collection_modifyitems(items):
    is_missing = importlib.util.find_spec('transformers') is None
    for item in items:
        if item.path.parent.name != 'hosts':
            continue
        if is_missing:
            item.add_marker(pytest.mark.skip(reason='the hosts are not installed: run `make hosts`'))
        for name in ('host', 'limit'):  # pytest-xdist returns reports, but not marks
            marker = item.get_closest_marker(name)
            if marker:
                entry = [*marker.args, marker.kwargs.get('catch', ''), item.callspec.params['kind']]
                item.user_properties.append((name, entry))


class Table:
    """Collects the results of each host from the test reports."""

    def __init__(self, config):
        self.path = None if hasattr(config, 'workerinput') else config.getoption('--table', None)
        self.rows, self.limits, self.complete = {}, {}, True

    def pytest_runtest_logreport(self, report):
        fails_as_expected = hasattr(report, 'wasxfail') and report.skipped
        self.complete &= report.passed or fails_as_expected
        if report.when != 'call':
            return
        for name, entry in report.user_properties:
            if name == 'host':
                host, distribution, catch, kind = entry
                cells = self.rows.setdefault((host, distribution, catch), {})
                cells[kind] = cells.get(kind, True) and report.passed
            elif name == 'limit':
                self.limits[entry[0]] = entry[1]

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
                f'{self.path}: {"written" if self.complete else "unchanged, because a test failed or was skipped"}')
