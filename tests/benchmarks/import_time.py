"""Measures the time of `import timm_spa` after `import timm`, in new interpreters.

    python tests/benchmarks/import_time.py [ROUNDS]
"""
import platform
import statistics
import subprocess
import sys
from typing import Dict, List

PROGRAM = """
import time
import timm
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""


def measure(statement: str) -> float:
    """Returns the seconds of a statement after `import timm`, in a new interpreter."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM.format(statement=statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Prints the median, minimum and maximum of each statement, measured in turn."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    seconds: Dict[str, List[float]] = {'pass': [], 'import timm_spa': []}
    for _ in range(rounds):
        for statement, results in seconds.items():
            results.append(measure(statement))
    print(f'Python {platform.python_version()}, {platform.machine()}, {rounds} rounds, after `import timm`')
    for statement, results in seconds.items():
        print(f'{statement:16}  median {statistics.median(results):.4f} s  '
              f'min {min(results):.4f} s  max {max(results):.4f} s')


if __name__ == '__main__':
    main()
