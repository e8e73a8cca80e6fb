"""What the workers of a test run make once and share."""

import fcntl


def once(folder, make):
    """The folder with what `make(folder)` writes there: the first worker calls it, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder
