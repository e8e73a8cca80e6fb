"""What the benchmark's commands share: numbers and files as options, and how a command ends.

Imports nothing that takes time, so that --help comes at once.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

WRONG_USE = 2
CLOSED_PIPE = 141
"""Exit status of a command whose reader has gone: what a shell says of one that SIGPIPE ended, 128 + 13."""


class CommandError(Exception):
    """What a command needs and was not given, in a line."""


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and leave Python with its status.

    A `CommandError` is a line on stderr. Where the reader of its output has gone, as in `| head -1`, it ends quietly.
    """
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except CommandError as error:
        print(error, file=sys.stderr)
        status = WRONG_USE
    except BrokenPipeError:
        if not _is_closed():
            raise  # another pipe's
        status = CLOSED_PIPE
    sys.exit(status)


def _is_closed() -> bool:
    """Whether nobody reads stdout; what it still has is dropped then, or Python would fail to write it at its end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def integer(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that takes the integers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, got {text[:40]}")
        return number

    return parse


def writable_folder(name: str, folder: Path) -> Path:
    """The folder, made where there is none.

    Args:
        name: the command and its option, "bench: --output".

    Raises:
        CommandError: if it cannot be made, or nothing can be written there.
    """
    with needing(f"{name} must be a folder that can be written to, got {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def writable_file(name: str, file: Path) -> Path:
    """A file that may be there already, in a folder that is made where there is none.

    Raises:
        CommandError: if it cannot be written.
    """
    if file.is_dir():
        raise CommandError(f"{name} must be a file that can be written, got the folder {file}")
    with needing(f"{name} must be a file that can be written, got {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    return file


@contextmanager
def needing(what: str) -> Iterator[None]:
    """A file that cannot be used, or has other contents than the code inside expects, is a `CommandError`."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"{what}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CommandError(f"{what}: {type(error).__name__}, {error}") from error
