"""Run gputune's command line with ``python -m gputune``, if the script ``gputune`` is not on the
path."""

import sys

from gputune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
