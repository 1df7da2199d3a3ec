"""A process tree that dies together.

A killed front process would leave its engine processes behind with gigabytes, for good. So the front holds the write
end of a pipe that nobody ever writes to, and every process forked below it holds only the read end and a thread that
waits for end of file: that comes when the front is gone, however it died. PR_SET_PDEATHSIG alone is not enough: it
reaches children, not grandchildren, and follows the thread that forked rather than the process.
"""

import os
import threading
from typing import Final

# What a shell shows for a process that SIGKILL ended; nobody reads it, it only must not look like success.
_LOST_FRONT_STATUS: Final = 137


class Lifeline:
    """The pipe. Made in the front process before it forks anything; lives as long as the process."""

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe()
        # The hook runs in every process that is forked from here on, at any depth.
        os.register_at_fork(after_in_child=self._hold_on)

    def _hold_on(self) -> None:
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1
        threading.Thread(target=_exit_at_end_of_file, args=(self._read_end,), name="lifeline", daemon=True).start()


def _exit_at_end_of_file(descriptor: int) -> None:
    while True:
        try:
            if not os.read(descriptor, 1):
                break
        except InterruptedError:
            continue
        except OSError:
            # The descriptor was closed under us: without a lifeline the process must not outlive the front either.
            break
    os._exit(_LOST_FRONT_STATUS)
