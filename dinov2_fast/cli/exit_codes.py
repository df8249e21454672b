"""The exit codes of every command."""

OK = 0
ABORTED = 1  # verify: the features differ
WRONG_USAGE = 2  # argparse's
SOME_FAILED = 3  # finished, but some images could not be read
INTERRUPTED = 130
