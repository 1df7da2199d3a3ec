"""Tasks that run beside a block and end with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _BlockEnded(Exception):
    """Cancels the group's tasks: a TaskGroup waits for them otherwise."""


@asynccontextmanager
async def background() -> AsyncIterator[asyncio.TaskGroup]:
    """Lends a group whose tasks are cancelled when the block ends; a task that raises ends the block."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
            # Not abstracted: raised here it leaves through the group, which is what cancels the tasks.
            raise _BlockEnded  # noqa: TRY301
    except* _BlockEnded:
        pass
