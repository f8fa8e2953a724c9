"""``python -m kd_kernels <command>``: see :mod:`kd_kernels.cli`."""

import sys

from kd_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
