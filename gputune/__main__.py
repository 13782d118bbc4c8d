"""Run the command line with ``python -m gputune``, if no script is on the path."""

import sys

from gputune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
