"""Marks that divide test cases between `make test` and `make test-slow`."""
import pytest


def slow_unless(quick, cases):
    """Marks a case as slow if `quick` returns False for its first argument."""
    params = [
        case if hasattr(case, 'marks') else pytest.param(*case if isinstance(case, tuple) else [case])
        for case in cases]
    return [pytest.param(*p.values, id=p.id, marks=[*p.marks, *([] if quick(p.values[0]) else [pytest.mark.slow])])
            for p in params]
