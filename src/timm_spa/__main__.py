"""`python -m timm_spa`: the command line."""
import sys

from timm_spa_cli import main

if __name__ == '__main__':
    sys.exit(main())
