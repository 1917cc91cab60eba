"""Which files of a listing make the Hugging Face folder that `engine.weights.folder` reads, before any is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from engine.errors import SourceError


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def is_folder(there: Mapping[str, int]) -> bool:
    """Whether a listing (paths from the folder on -> bytes) is one of such a folder."""
    return "config.json" in there and any(map(is_weights, there))


def choose_files(there: Mapping[str, int], where: str, read: Callable[[str], bytes]) -> list[str]:
    """The paths to fetch of a listing that `is_folder`: text files that are read, then weights, and nothing else.

    Weights come in no other format (.bin and .pt files can run code), and once: copies in folders of their own are
    left out. `read` gives the content of a small file. Raises SourceError, about `where`, for weights that cannot be
    told from others or are not there.
    """
    # Imported here: naming a source does not need what reads checkpoints.
    from engine.weights.folder import TEXT_FILES

    return [*(name for name in TEXT_FILES if name in there), *_weights(there, where, read)]


def is_weights(path: str) -> bool:
    return "/" not in path and path.endswith(".safetensors")


def listed(files: Mapping[str, int], most: int = 12) -> str:
    """Paths and sizes for a message."""
    every = [f"{path} ({nbytes / 1e6:,.1f} MB)" for path, nbytes in files.items()]
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest or "none"


def _weights(there: Mapping[str, int], where: str, read: Callable[[str], bytes]) -> list[str]:
    """The weights as `engine.weights.folder` will look for them: one whole file, else those of the index."""
    from engine.weights.folder import INDEX, WHOLE

    if WHOLE in there:
        return [WHOLE]
    if INDEX in there:
        try:
            names = sorted(set(msgspec.json.decode(read(INDEX), type=_Index).weight_map.values()))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SourceError(f"{where}: {INDEX} cannot be read: {error}.") from error
        missing = [name for name in names if name not in there or not is_weights(name)]
        if missing or not names:
            raise SourceError(f"{where}: {INDEX} names no weights or weights that are not there: {missing[:5]}.")
        return [INDEX, *names]
    found = {path: nbytes for path, nbytes in there.items() if is_weights(path)}
    if len(found) > 1:
        raise SourceError(f"{where}: expected {WHOLE}, {INDEX} or one .safetensors file, found {listed(found)}.")
    return list(found)
