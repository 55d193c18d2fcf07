"""Imports timm_spa after timm, in the Python processes of `timm-spa with`, which puts this folder first on PYTHONPATH.

Python imports this file when it starts. It runs in every Python process of the command, so it imports little and does
nothing in a process that does not import timm.
"""
import os
import sys
from importlib.machinery import PathFinder


class _RegisterAfterTimm:
    """Import hook that imports timm_spa as soon as timm has been executed, then removes itself.

    Asking for the spec of timm changes nothing: some programs look for timm before they import it.
    """

    def find_spec(self, name, path=None, target=None):
        if name != 'timm':
            return None
        specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader):
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            if module.__name__ == 'timm':  # the loader of a zip file is shared by all modules in it
                loader.exec_module = execute
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module


def _register():
    try:
        import timm_spa  # noqa: F401
    except ModuleNotFoundError as e:
        if e.name != 'timm_spa':
            raise
        raise ImportError(
            'timm-spa with: cannot register the models of timm_spa, because timm_spa is not installed for '
            f'{sys.executable}. Install it there.', name='timm_spa') from e


def _run_hidden():
    """Runs the sitecustomize that Python would have imported without this folder. Python reports its errors."""
    folder = os.path.realpath(os.path.dirname(__file__))
    # PYTHONPATH names this folder more than once if one `timm-spa with` starts another
    spec = PathFinder.find_spec('sitecustomize', [p for p in sys.path if os.path.realpath(p) != folder])
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        module = sys.modules['sitecustomize'] = module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _RegisterAfterTimm())
_run_hidden()
