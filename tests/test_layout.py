"""The packages import each other in one direction only."""
import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / 'src'
# a package imports only packages in rows above its own, or itself
ORDER = [
    {'_errors', '__init__'},
    {'_timm_release', '_names'},
    {'_shipped', 'environment'},
    {'layers'},
    {'checkpoints'},
    {'models'},
    {'profile'},
    {'training'},
    {'run'},
    {'predict'},
    {'hub'},
    {'explain'},
    {'benchmark_worker'},
    {'detection', 'export', 'benchmark'},
    {'timm_spa_cli'},
    {'__main__'},
]
ROW = {name: row for row, names in enumerate(ORDER) for name in names}


def module_name(path):
    parts = path.relative_to(SRC).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def package_of(module):
    """Returns the part of the package that a module belongs to, e.g. 'hub' for 'timm_spa.hub.card'."""
    first, _, rest = module.partition('.')
    return first if first != 'timm_spa' else rest.partition('.')[0] or '__init__'


def imported_modules(path):
    """Yields every module that a file imports, at its top or inside of functions, with the line."""
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            target = '.'.join([*base, *(node.module or '').split('.')]).rstrip('.')
            for alias in node.names:
                name = f'{target}.{alias.name}'
                is_module = (SRC / Path(*name.split('.'))).with_suffix('.py').exists() or (
                    SRC / Path(*name.split('.'))).is_dir()
                yield (name if is_module else target), node.lineno


FILES = sorted(SRC.rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=[module_name(path) for path in FILES])
def test_imports_point_to_earlier_packages(path):
    importer = package_of(module_name(path))
    if importer == '__init__':
        return
    backward = [
        f'line {line}: {module}' for module, line in imported_modules(path)
        if module.partition('.')[0] in ('timm_spa', 'timm_spa_cli') and package_of(module) != importer
        and ROW[package_of(module)] >= ROW[importer]]
    assert not backward


def test_a_backward_import_is_noticed(tmp_path):
    """The reader of imports sees lazy, relative and absolute imports."""
    modules = [module for module, _ in imported_modules(SRC / 'timm_spa' / 'models' / 'gated.py')]
    assert 'timm_spa.models._gate_table' in modules
    assert 'timm' in modules
    lazy = [module for module, _ in imported_modules(SRC / 'timm_spa_cli' / 'recipes.py')]
    assert 'timm_spa.checkpoints.files' in lazy
