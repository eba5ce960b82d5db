"""Files and folders that are written: checked before there is anything to lose, replaced as a whole, readable alike."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tkpo.errors import TKPOError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """Within this, a write that fails for lack of room, by whichever library, is a TKPOError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        by_torch = "PytorchStreamWriter" in str(error) or "file write failed" in str(error)  # torch.save's words
        if getattr(error, "errno", None) in FULL or isinstance(error, SafetensorError) or by_torch:
            raise TKPOError(
                f"cannot write to {path} ({' '.join(str(error).split())}): make room and give the same command again, "
                "it resumes from the last complete checkpoint"
            ) from error
        raise


def check_folder(path: str | Path) -> None:
    """TKPOError if `path` cannot become, or is not, a folder that this process may write to; nothing is created."""
    path = Path(path)
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not place.is_dir():
        raise TKPOError(f"cannot write to {path}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise TKPOError(f"cannot write to {path}: no permission to write in {place}")


def check_file(path: str | Path) -> None:
    """TKPOError if `path` cannot be written as a file; nothing is created."""
    if Path(path).is_dir():
        raise TKPOError(f"cannot write {path}: it is a folder; give a file name in it")
    check_folder(Path(path).absolute().parent)


def write_json(path: Path, value) -> None:
    """Write indented JSON; the file is replaced as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> dict:
    """An object that `write_json` wrote; TKPOError if the file is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise TKPOError(
            f"{path} is damaged ({error}): --restart replaces the run, or choose another --output"
        ) from error
    return value


def share_mode(folder: Path, example: Path) -> None:
    """Give the files in `folder` the permissions of `example`: safetensors writes weights for their owner alone."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(example.stat().st_mode)
