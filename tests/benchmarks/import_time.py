"""What `import timm_spa` costs on top of `import timm`, in fresh interpreters, the two taken in turn.

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
    """Returns the seconds that a statement takes after `import timm`, in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM.format(statement=statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Prints median, minimum and maximum of each."""
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
