"""Runs timm's own model tests, unchanged, on the models of this package.

    python tests/timm_suite.py                                  # every name
    python tests/timm_suite.py spa_resnet50 spa_mobilenetv2     # these

The source distribution of the installed timm holds the tests; it is fetched once, into `build/`. Two of the tests load
pretrained weights. The Hub's files are stood in for by a cache of random weights of timm's plain models, laid out as
huggingface_hub lays it out and read in offline mode, so that the loading itself is the real one.

Fails if a test fails or is skipped, if a name was tested by fewer tests than it must be, or if timm has the tests of a
family that our names did not get.
"""
import argparse
import collections
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Dict, List, Optional, Set

import safetensors.torch
import timm

import timm_spa

ROOT = Path(__file__).parent.parent
BUILD = ROOT / 'build' / 'timm_suite'
# timm's tests that every name must pass, those that timm gives to some families only included
TESTS = {
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_intermediates_features',
    'test_model_forward_intermediates',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
PRETRAINED_TESTS = {'test_model_load_pretrained', 'test_model_features_pretrained'}


def timm_source(version: Optional[str] = None) -> Path:
    """Returns the folder of a timm release's source distribution, fetched if it is not there; None for the newest."""
    BUILD.mkdir(parents=True, exist_ok=True)
    if version is None or not (BUILD / f'timm-{version}' / 'PKG-INFO').exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as downloads:
            subprocess.run(
                [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                 '--dest', downloads, f'timm=={version}' if version else 'timm'], check=True)
            [archive] = Path(downloads).glob('*.tar.gz')
            version = archive.name.removeprefix('timm-').removesuffix('.tar.gz')
            with tarfile.open(archive) as members:
                members.extractall(BUILD, filter='data')
    return BUILD / f'timm-{version}'


def default_tag(name: str) -> str:
    """Returns a name with the tag of its default weights; the other warm starts differ in nothing but the file."""
    return f'{name}.{timm.get_pretrained_cfg(name).tag}'


def fill_cache(names: List[str], cache: Path) -> None:
    """Lays random weights of the plain models where huggingface_hub would have put the published ones."""
    for name in map(default_tag, names):
        cfg = timm.get_pretrained_cfg(name)
        if not cfg.hf_hub_id:
            continue
        repository = cache / ('models--' + cfg.hf_hub_id.replace('/', '--'))
        snapshot = repository / 'snapshots' / ('0' * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / 'refs').mkdir(exist_ok=True)
        (repository / 'refs' / 'main').write_text('0' * 40)
        target = snapshot / (cfg.hf_hub_filename or 'model.safetensors')
        if not target.exists():
            plain = timm.create_model(cfg.hf_hub_id.rpartition('/')[2].partition('.')[0])
            partial = target.with_suffix('.partial')
            safetensors.torch.save_file(plain.state_dict(), partial)
            partial.rename(target)


def run_tests(cases: List[str], source: Path, jobs: int, **environment: str) -> ET.Element:
    """Runs timm's file of model tests in a process of its own, and returns its report.

    Args:
        cases: Names of models, those for the tests of pretrained weights with their tags.
        source: Folder of timm's source distribution.
        jobs: Processes.
        **environment: Environment variables of the tests.
    """
    report = BUILD / 'report.xml'
    report.unlink(missing_ok=True)
    # cases are called '...[1-spa_resnet18]' or '...[1-spa_resnet18.warm_a1_in1k]'; '-k' would also find longer names
    selector = BUILD / 'select_names.py'
    selector.write_text(
        'import re\n'
        f'CASES = {sorted(cases)!r}\n'
        'def pytest_collection_modifyitems(config, items):\n'
        "    cases = [re.search(r'\\[\\d+-([^]]+)', item.name) for item in items]\n"
        '    keep = [i for i, case in zip(items, cases) if case and case[1] in CASES]\n'
        '    config.hook.pytest_deselected(items=[i for i in items if i not in set(keep)])\n'
        '    items[:] = keep\n')
    paths = [str(BUILD), environment.pop('PYTHONPATH', ''), os.environ.get('PYTHONPATH', '')]
    variables = dict(os.environ, **environment, PYTHONPATH=os.pathsep.join(filter(None, paths)), TIMEOUT='1200')
    variables.pop('GITHUB_ACTIONS', None)  # timm runs less where it is set
    if jobs > 1:
        variables['OMP_NUM_THREADS'] = '1'
    subprocess.run(
        [sys.executable, '-m', 'pytest', str(source / 'tests' / 'test_models.py'), '-p', 'select_names',
         '-p', 'no:cacheprovider', '-c', os.devnull, '--rootdir', str(source), '-n', str(jobs), '-q', '-rfEs',
         '--import-mode', 'importlib',  # not to import the timm that lies beside the tests
         '-W', 'ignore', f'--junitxml={report}',
         '--override-ini', 'markers=base\ncfg\ntorchscript\nfeatures\nfxforward\nfxbackward'],
        env=variables, check=False)
    return ET.parse(report).getroot()


def problems_of(report: ET.Element, names: List[str], pretrained: List[str]) -> List[str]:
    """Compares the report with the tests that every name, and every tag with weights, must have passed."""
    problems = []
    passed: Dict[str, Set[str]] = collections.defaultdict(set)
    for case in report.iter('testcase'):
        title = case.get('name', '')
        outcome = next((c.tag for c in case if c.tag in ('failure', 'error', 'skipped')), 'passed')
        if outcome != 'passed':
            problems.append(f'{outcome}: {title}')
            continue
        test, _, parameters = title.partition('[')
        passed[re.sub(r'^\d+-', '', parameters.rstrip(']'))].add(test)
    for name in names:
        # timm leaves TorchScript out for every name that begins with densenet
        expected = {t for t in TESTS if not (name.startswith('densenet') and t.endswith('torchscript'))}
        if name == 'gated':  # timm gives these to the files of its own families
            expected -= {t for t in TESTS if 'intermediates' in t}
        missing = expected - set().union(*(tests for key, tests in passed.items() if key.partition('.')[0] == name))
        if missing:
            problems.append(f'{name} was not tested by {", ".join(sorted(missing))}')
    for tagged in pretrained:
        if not passed[tagged] >= PRETRAINED_TESTS:
            problems.append(f'{tagged} was not tested by {", ".join(sorted(PRETRAINED_TESTS - passed[tagged]))}')
    return problems


def main() -> int:
    """Runs the command line, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='models to test (default: all of this package)')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, help='processes (default: one a core)')
    args = parser.parse_args()
    ours = timm_spa.list_models()
    names = args.names or ours
    unknown = sorted(set(names) - set(ours))
    if unknown:
        parser.error(f'no model of this package: {", ".join(unknown)}')

    source = timm_source(importlib.metadata.version('timm'))
    cache = BUILD / 'hub'
    fill_cache(names, cache)
    tags = [default_tag(name) for name in names]
    report = run_tests(
        [*names, *tags], source, args.jobs, TORCH_BACKEND='timm_spa', HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(cache))
    problems = problems_of(report, names, [tag for tag in tags if tag in timm.list_pretrained()])
    count = sum(1 for _ in report.iter('testcase'))
    print(f"timm {timm.__version__}'s own tests on {len(names)} models: {count} run, {len(problems)} problems")
    for problem in problems:
        print(f'  {problem}')
    return 1 if problems or not count else 0


if __name__ == '__main__':
    sys.exit(main())
