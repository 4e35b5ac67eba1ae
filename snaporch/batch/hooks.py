"""Programs of the user's, run before and after; no shell, and each with a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Mapping

import trio

from snaporch.batch.plan import Hook
from snaporch.errors import OperationFailed

WORDS = 500  # of what a hook that fails has said last
_GRACE = 5.0


class HookFailed(OperationFailed):
    """A hook could not be started, took too long, or ended with another status than 0."""


async def run_hooks(hooks: Iterable[Hook], variables: Mapping[str, str]) -> None:
    """Run hooks, one after the other, each in a session of its own.

    Args:
        hooks: what to run.
        variables: for their environments, as ``SNAPORCH_NAME``.

    Raises:
        HookFailed: one failed; those behind it were not begun.
    """
    environment = os.environ | {f"SNAPORCH_{name}": value for name, value in variables.items()}
    for hook in hooks:
        await _run(hook, environment)


async def _run(hook: Hook, environment: Mapping[str, str]) -> None:
    name = " ".join(hook.command)
    with trio.move_on_after(hook.deadline) as scope:
        try:
            done = await trio.run_process(
                hook.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                start_new_session=True,
                deliver_cancel=_end_session,
            )
        except OSError as error:
            raise HookFailed(f"hook {name!r} does not start: {error.strerror}") from None
    if scope.cancelled_caught:
        raise HookFailed(f"hook {name!r} took longer than {hook.deadline:g} s and was ended")
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-WORDS:]
        raise HookFailed(f"hook {name!r} ended with status {done.returncode}" + (f": {said}" if said else ""))


async def _end_session(process: trio.Process) -> None:
    """End a hook and all that it has started: politely, then by force."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with trio.move_on_after(_GRACE, shield=True):
            await process.wait()
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # none is left
