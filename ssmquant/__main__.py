"""``python -m ssmquant``: the same as the command ``ssmquant``."""

import sys

from ssmquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
