"""Which of many cases `make test` runs, and which are left to `make test-slow`."""
import pytest


def slow_unless(quick, cases):
    """Marks every case as slow for which `quick` is false, a function of its first argument."""
    params = [
        case if hasattr(case, 'marks') else pytest.param(*case if isinstance(case, tuple) else [case])
        for case in cases]
    return [pytest.param(*p.values, id=p.id, marks=[*p.marks, *([] if quick(p.values[0]) else [pytest.mark.slow])])
            for p in params]
