"""What the cache folder holds, model by model, and how it gets out again."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.config import seraph_home
from engine.errors import FormatError, SourceError
from engine.models.spec import DecoderSpec
from engine.weights import described, hub, pypi, store
from engine.weights.files import lock, writing
from engine.weights.pack import open_packed
from engine.weights.source import FileSource, HubSource, WheelSource, entry_of, parse

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class InstalledModel:
    """One source's files in the cache folder: packed ones, what was fetched to pack them, what vLLM is given."""

    name: str  # its id in the API
    source: str = ""  # what to load it by; empty where only a damaged or outdated packed file is left
    format: str = ""  # as "Q4_1 GGUF"; of the checkpoint
    packed: dict[Path, str | None] = field(default_factory=dict)  # files that a start maps -> quantization
    damaged: list[Path] = field(default_factory=list)  # packed files that will be made anew when they are wanted
    fetched: Path | None = None  # a .gguf file or a folder
    converted: Path | None = None  # the folder that vLLM is given of a .gguf file
    commit: str = ""  # of the repository
    nbytes: int = 0  # of everything that removing it frees
    kind: str = ""  # as `CatalogEntry.kind`; empty where it is not packed and the catalogue does not say

    @property
    def path(self) -> Path:
        """Where it is: what a start maps, else what would be packed."""
        for paths in (self.packed, self.damaged):
            if paths:
                return next(iter(paths))
        found = self.fetched or self.converted
        assert found is not None
        return found


def installed(home: Path | None = None) -> list[InstalledModel]:
    """The models in the cache folder, by name. What is half fetched or half packed is none."""
    return sorted(_by_stem(seraph_home(home)).values(), key=lambda model: (model.name, model.source))


def unfinished(home: Path | None = None) -> list[tuple[str, int]]:
    """Sources with bytes of fetches that were cut short: fetching goes on from there, `remove` drops them."""
    return list(hub.unfinished(seraph_home(home)))


def sweep(home: Path | None = None) -> None:
    """Remove what killed commands left, but for what a fetch will go on with. Others may be at work meanwhile.

    What cannot be removed, because the folder is somebody else's, is left with a word in the log.
    """
    root = seraph_home(home)
    for clear in (store.sweep, pypi.sweep, hub.sweep):
        try:
            clear(root)
        except SourceError as error:
            logger.info("left as it is: %s", error)


def remove(names: Sequence[str], home: Path | None = None) -> list[tuple[str, int]]:
    """Remove models, by name, source or path as listed, from the cache folder: (name, bytes freed) of each.

    All or none is found before the first is removed. A file or folder of the user's own stays, as does whatever a
    process still maps, until that process ends. Raises SourceError for a name that is unknown or means several models.
    """
    root = seraph_home(home)
    models = _by_stem(root)
    chosen = dict.fromkeys(_find(name, models, root) for name in names)
    return [_remove(stem, models[stem], root) for stem in chosen]


def _by_stem(root: Path) -> dict[str, InstalledModel]:
    """Models by what their packed files' names begin with, which name and source decide."""
    found: dict[str, InstalledModel] = {}
    for path in sorted((root / "packed").glob("*.seraph")):
        if (parts := store.split_packed_name(path.name)) is None:
            continue  # not ours
        try:
            nbytes = path.stat().st_size
        except FileNotFoundError:
            continue  # removed since it was listed
        model = found.setdefault(parts[0], InstalledModel(parts[1]))
        model.nbytes += nbytes
        try:
            packed = open_packed(path, wanted=False)
        except (FormatError, SourceError):
            model.damaged.append(path)
            continue
        model.name, model.source, model.commit = packed.name, packed.source.origin, packed.source.commit
        model.format = packed.info.checkpoint_format
        model.kind = "decoder" if isinstance(packed.info.spec, DecoderSpec) else "encoder"
        model.packed[path] = packed.source.quantization
        packed.close()
    for source, fetched, nbytes, commit in _fetched(root):
        model = found.setdefault(store.packed_stem(source.name, source.origin), InstalledModel(source.name))
        model.source, model.fetched, model.commit = source.origin, fetched, commit or model.commit
        model.format = model.format or ("GGUF" if fetched.suffix == ".gguf" else "safetensors")
        model.nbytes += nbytes
        if (entry := entry_of(source)) is not None:
            model.kind = entry.kind
    for stem, name, folder in described.converted(root):
        model = found.setdefault(stem, InstalledModel(name))
        model.converted = folder
        model.format = model.format or "safetensors"
        model.kind = model.kind or "decoder"
        model.nbytes += described.folder_bytes(folder)
    return found


def _fetched(root: Path) -> Iterator[tuple[WheelSource | HubSource, Path, int, str]]:
    for checkpoint, nbytes in pypi.fetched(root):
        wheel = WheelSource(checkpoint.name, checkpoint)
        entry = entry_of(wheel)
        yield WheelSource(entry.name, checkpoint) if entry is not None else wheel, checkpoint.path(root), nbytes, ""
    for record in hub.records(root):
        source = parse(record.wanted.source)
        assert isinstance(source, HubSource)
        nbytes = sum(one.size for one in record.listing.files)
        yield source, record.path(root), nbytes, record.listing.commit


def _find(wanted: str, models: dict[str, InstalledModel], root: Path) -> str:
    """The stem of the one model that `wanted` means."""
    stems = [stem for stem, model in models.items() if wanted in _spellings(model)]
    if not stems:
        try:
            source = parse(wanted)
        except SourceError:
            raise _unknown(wanted, models.values()) from None
        stem = store.packed_stem(source.name, source.origin)
        if stem not in models and not (isinstance(source, HubSource) and _is_unfinished(source, root)):
            own = "; it is a file of your own" if isinstance(source, FileSource) and source.path.exists() else ""
            raise _unknown(wanted, models.values(), own)
        models.setdefault(stem, InstalledModel(source.name, source.origin))
        return stem
    if len(stems) > 1:
        choices = ", ".join(sorted(models[stem].source or str(models[stem].path) for stem in stems))
        raise SourceError(f"{wanted!r} means {len(stems)} models: name one by its source: {choices}.")
    return stems[0]


def _spellings(model: InstalledModel) -> set[str]:
    paths = [*model.packed, *model.damaged, *filter(None, (model.fetched, model.converted))]
    return {model.name, *map(str, paths)} | ({model.source} if model.source else set())


def _is_unfinished(source: HubSource, root: Path) -> bool:
    return any(repo == f"hf:{source.checkpoint.repo}" for repo, _ in hub.unfinished(root))


def _unknown(wanted: str, models: Iterable[InstalledModel], why: str = "") -> SourceError:
    names = ", ".join(sorted(model.name for model in models)) or "nothing"
    return SourceError(f"{wanted!r} is not in the cache{why}. There is: {names}.")


def _remove(stem: str, model: InstalledModel, root: Path) -> tuple[str, int]:
    purpose = f"removing {model.name}"
    freed = 0
    with lock(root / "packed" / f"{stem}.lock", purpose), writing(root, 0, purpose):
        # Looked for again: another process may have packed it anew while we waited.
        for path in sorted((root / "packed").glob(f"{glob.escape(stem)}*.seraph")):
            parts = store.split_packed_name(path.name)
            if parts is not None and parts[0] == stem:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        freed += described.forget_converted(stem, root)
        if model.source.startswith(("pypi:", "hf:")):
            match parse(model.source):
                case WheelSource() as wheel:
                    freed += pypi.forget(wheel.checkpoint, root)
                case HubSource() as repository:
                    freed += hub.forget(repository.checkpoint, root)
    return model.name, freed
