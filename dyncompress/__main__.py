"""``python -m dyncompress`` is the ``dyncompress`` command."""

import sys

from dyncompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
