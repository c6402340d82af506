"""`python -m tl_dla` is the command `tl-dla`."""

import sys

from tl_dla.cli import main

if __name__ == "__main__":
    sys.exit(main())
