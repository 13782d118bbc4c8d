"""What every test takes for granted of the process that runs it."""

import signal

# A shell starts its background jobs with Ctrl-C ignored, which they and all that they start inherit: the tests of
# Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
