"""python -m sdedit: the command `sdedit`."""

import sys

from sdedit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
