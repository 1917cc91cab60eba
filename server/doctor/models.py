"""The cache folder, and the models in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.config import QUANTIZATIONS, seraph_home
from engine.errors import SourceError
from engine.weights import InstalledModel, catalog, installed, unfinished
from engine.weights.check import Condition, Examined, check_packed, leftovers
from engine.weights.source import FileSource, FolderSource, parse
from engine.weights.store import packed_path
from server.doctor.finding import Finding, ok, problem, readable, warning


def examine_cache(
    home: Path | None = None, *, free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> Iterator[Finding]:
    """Findings about the cache folder (None: the one in use). `free` tells the bytes left where a folder is."""
    root = seraph_home(home)
    folder = next(path for path in (root, *root.absolute().parents) if path.exists())
    if reason := _not_writable(folder):
        what = f"{root} cannot be written to" if folder == root else f"{root} cannot be made in {folder}"
        yield problem("folder", f"{what}: {reason}", "Set SERAPH_HOME to a folder of yours.")
    else:
        yield ok("folder", str(root) + ("" if folder == root else ", made when it is needed"))
    yield _space(folder, free(folder))
    left = list(leftovers(root))
    if left:
        what = ", ".join(str(path) for path, _ in left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        nbytes = sum(size for _, size in left)
        advice = "`seraph models` clears them away."
        yield warning("leftovers", f"of killed commands, {readable(nbytes)}: {what}", advice)
    else:
        yield ok("leftovers", "none")
    for source, nbytes in unfinished(root):
        advice = f"`seraph pull {source}` goes on with it, `seraph rm {source}` drops it."
        yield warning("unfinished", f"{source}, {readable(nbytes)} fetched", advice)


def examine(sources: Sequence[str] = (), *, deep: bool = False, home: Path | None = None) -> Iterator[Finding]:
    """Findings about the models named by `sources`, or all in the cache folder. `deep` reads all of their data."""
    root = seraph_home(home)
    models = installed(root)
    if not sources and not models:
        yield ok("models", "none in the cache; `seraph pull` fetches one")
    for model in models if not sources else ():
        yield from _installed(model, root, deep)
    for source in sources:
        known = [model for model in models if source in (model.name, model.source)]
        if known:
            for model in known:
                yield from _installed(model, root, deep)
        else:
            yield from _named(source, root, deep)


def _not_writable(folder: Path) -> str:
    """Why nothing can be written to a folder; empty where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"doctor")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _space(folder: Path, nbytes: int) -> Finding:
    # A wheel is held twice for a moment, beside what is unpacked of it and what is packed.
    needed = max(2 * entry.wheel_bytes + 2 * entry.nbytes for entry in catalog())
    if nbytes < needed:
        return warning(
            "space",
            f"{readable(nbytes)} free; the largest model of the catalogue takes {readable(needed)} to fetch and pack",
            "Free some, remove models with `seraph rm`, or set SERAPH_HOME to another disk.",
        )
    return ok("space", f"{readable(nbytes)} free")


def _installed(model: InstalledModel, root: Path, deep: bool) -> Iterator[Finding]:
    for path in [*model.packed, *model.damaged]:
        yield _packed(model.name, check_packed(path, root, deep=deep))
    if not model.packed and not model.damaged and model.fetched is None:
        yield ok(model.name, f"converted for vLLM: {model.converted}")
    elif not model.packed and not model.damaged:
        yield ok(model.name, f"{model.format}, fetched and not packed yet: the first start packs it")


def _named(source: str, root: Path, deep: bool) -> Iterator[Finding]:
    """A source that is no model of the cache by its name: it may be packed under another, or not at all."""
    try:
        parsed = parse(source)
    except SourceError as error:
        yield problem(source, str(error).splitlines()[0], "`seraph models` lists what there is.")
        return
    if isinstance(parsed, FileSource | FolderSource) and not parsed.path.exists():
        yield problem(source, "does not exist", "Correct the path.")
        return
    if isinstance(parsed, FileSource) and parsed.path.suffix == ".seraph":
        yield _packed(source, check_packed(parsed.path, root, deep=deep))
        return
    paths = [packed_path(parsed, root, quantization) for quantization in (None, *QUANTIZATIONS)]
    there = [path for path in paths if path.exists()]
    for path in there:
        yield _packed(source, check_packed(path, root, deep=deep))
    if not there:
        yield warning(source, "not in the cache", f"`seraph pull {source}` fetches and packs it.")


def _packed(subject: str, examined: Examined) -> Finding:
    detail = f"{examined.path.name}: {examined.said}"
    match examined.condition:
        case Condition.CURRENT:
            return ok(subject, detail)
        case Condition.OUTDATED:
            return warning(subject, detail, "The next start packs it again, where its checkpoint is.")
        case Condition.DAMAGED:
            return problem(subject, detail, f"Delete {examined.path}: the next start packs it again.")
