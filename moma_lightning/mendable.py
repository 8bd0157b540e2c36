"""What a person can mend is one line; everything else keeps its traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Errors that say what is wrong with the input, a file or what is installed.
MENDABLE = (ValueError, OSError, ImportError)


@contextmanager
def one_line(command: str) -> Iterator[None]:
    """Ends the process with `command: message` where one of these is raised."""
    try:
        yield
    except MENDABLE as error:
        sys.exit(f"{command}: {error}")
