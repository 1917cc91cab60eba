"""From a source's name to mapped weights: fetch once, pack once, then map."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import QUANTIZATIONS, seraph_home
from engine.errors import ConfigError, FormatError, SourceError, UnsupportedModelError
from engine.models.spec import DecoderSpec, EncoderSpec
from engine.weights import pack
from engine.weights.catalog import catalog
from engine.weights.files import lock, try_lock, writing
from engine.weights.pack import PackedModel, open_packed, write_packed
from engine.weights.progress import NoProgress, Progress
from engine.weights.source import FileSource, HubSource, Located, Source, WheelSource, entry_of, locate, parse, readable

if TYPE_CHECKING:
    from engine.weights.hub_client import HubClient

logger = logging.getLogger(__name__)

_MAX_NAME = 100  # bytes of a model's name in its packed file's name
_PACKED = re.compile(r"(?P<stem>(?P<name>.+)-[0-9a-f]{16})(?:-(?P<quantization>[a-z0-9]+))?\.seraph")
_TEMPORARY = re.compile(rf"{_PACKED.pattern}\.\d+\.tmp")


def load_model(source: str, **options: Any) -> PackedModel:
    """Map the decoder that `source` names; `options` as of `load_packed`.

    Raises as it does, and UnsupportedModelError for an encoder.
    """
    model = load_packed(source, **options)
    if not isinstance(model.info.spec, DecoderSpec):
        model.close()
        raise UnsupportedModelError(
            f"{model.name} is an encoder ({model.info.spec.family}): it makes vectors of texts and continues none. "
            "A decoder is expected here."
        )
    return model


def load_encoder(source: str, **options: Any) -> PackedModel[EncoderSpec]:
    """Map the encoder that `source` names; `options` as of `load_packed`.

    Raises as it does, and UnsupportedModelError for a decoder.
    """
    model = load_packed(source, **options)
    if not isinstance(model.info.spec, EncoderSpec):
        model.close()
        raise UnsupportedModelError(
            f"{model.name} is a decoder ({model.info.spec.family}), and an encoder is expected here, as "
            f"{', '.join(entry.name for entry in catalog() if entry.kind == 'encoder')}."
        )
    return model


def load_packed(
    source: str,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    quantization: str | None = None,
    refresh: bool = False,
    client: HubClient | None = None,
) -> PackedModel[Any]:
    """Map the model that `source` names, after fetching and packing it where that has not happened yet.

    `quantization`, one of `engine.config.QUANTIZATIONS`, says what becomes of float weights (None: what the catalogue
    says of the model, else they stay what the checkpoint has); each has a packed file of its own. A warm start opens
    one file under `home`, never the checkpoint and never the network. A packed file that is damaged, of another
    version, or older than the checkpoint it was made from is packed again; with `refresh` a branch of a repository is
    looked up, and packed again if its files changed.

    Safe against other processes and threads doing the same, and against being killed at any moment. `client` is the
    hub to fetch from (None: the one that the environment names). Raises SourceError, FormatError or
    UnsupportedModelError, and ConfigError for a quantization that does not go with the source.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    root = seraph_home(home)
    progress = progress or NoProgress()
    parsed = parse(source)
    if isinstance(parsed, FileSource) and parsed.path.suffix == ".seraph":
        return _open_named(locate(parsed, root, progress).path, quantization)
    entry = entry_of(parsed)
    if quantization is None and entry is not None:
        quantization = entry.quantization
    model = _packed(parsed, root, progress, quantization, refresh, client)
    if entry is not None and entry.generation:
        # Not packed with the model: what the catalogue says may change, and the file stays.
        defaults = {**model.info.generation_defaults, **entry.generation}
        model.info = dataclasses.replace(model.info, generation_defaults=defaults)
    return model


def _packed(
    source: Source,
    root: Path,
    progress: Progress,
    quantization: str | None,
    refresh: bool,
    client: HubClient | None,
) -> PackedModel[Any]:
    """The packed file of a source, mapped, after making it where there is none that is current."""
    target = packed_path(source, root, quantization)
    if not refresh and (model := _open_current(target, _known_stamp(source, root))) is not None:
        return model
    with lock(lock_path(source, root), f"packing {source.name}"):
        # Another process may have packed it while we waited.
        if not refresh and (model := _open_current(target, _known_stamp(source, root), tell=True)) is not None:
            return model
        # Located under this lock, which a removal takes too: what was fetched stays until it is packed.
        located = locate(source, root, progress, refresh=refresh, client=client)
        if refresh and (model := _open_current(target, located.stamp, tell=True)) is not None:
            return model
        _pack(located, target, source, quantization, progress)
        return open_packed(target)


def packed_path(source: Source, home: Path, quantization: str | None) -> Path:
    """Where the packed file of a source lies, whether or not it is there."""
    suffix = f"-{quantization}" if quantization is not None else ""
    return home / "packed" / f"{packed_stem(source.name, source.origin)}{suffix}.seraph"


def lock_path(source: Source, home: Path) -> Path:
    """The lock that whoever packs a source holds, in whatever quantization; whoever removes it, too."""
    return home / "packed" / f"{packed_stem(source.name, source.origin)}.lock"


def packed_stem(name: str, origin: str) -> str:
    """How the names of a source's packed files begin."""
    digest = hashlib.sha256(os.fsencode(origin)).hexdigest()[:16]
    return f"{name.encode()[:_MAX_NAME].decode(errors='ignore')}-{digest}"


def split_packed_name(file_name: str) -> tuple[str, str] | None:
    """The stem and the model's name in a packed file's name; None for other files."""
    match = _PACKED.fullmatch(file_name)
    return (match["stem"], match["name"]) if match is not None else None


def sweep(home: Path) -> None:
    """Remove what killed runs left beside packed files; what another process is writing just now stays."""
    for path in sorted((home / "packed").glob("*.tmp")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        with (
            try_lock(path.with_name(f"{match['stem']}.lock"), f"clearing {path}") as held,
            writing(path.parent, 0, f"clearing {path}"),
        ):
            if held:
                path.unlink(missing_ok=True)


def _known_stamp(source: Source, home: Path) -> str | None:
    """The stamp of a source that can be known without fetching; None where any packed file of it is current."""
    match source:
        case WheelSource():
            return source.checkpoint.stamp
        case HubSource():
            return None
    return locate(source, home, NoProgress()).stamp


def _open_named(path: Path, quantization: str | None) -> PackedModel[Any]:
    model = open_packed(path)
    packed = model.source.quantization
    if quantization not in (None, packed):
        model.close()
        how = f"with quantization {packed}" if packed is not None else "as its checkpoint was"
        raise ConfigError(
            f"quantization {quantization} cannot be had from {path}, which was packed {how}: name the checkpoint it "
            f"was packed from ({model.source.origin or model.source.name})."
        )
    return model


def _open_current(target: Path, stamp: str | None, *, tell: bool = False) -> PackedModel[Any] | None:
    """The packed file, or None where there is none that can be used. `stamp` None: any will do.

    `tell` where None means that it is packed now: then it is logged what is wrong with the file that is there.
    """
    if not target.exists():
        return None
    try:
        model = open_packed(target)
    except FormatError as error:
        if tell:
            logger.warning("packing again: %s", error)
        return None
    except SourceError:
        if target.exists():
            raise
        return None  # removed since we looked
    if stamp is not None and model.source.stamp != stamp:
        if tell:
            logger.info("packing again: the checkpoint has changed since %s was packed", target)
        model.close()
        return None
    return model


def _pack(located: Located, target: Path, source: Source, quantization: str | None, progress: Progress) -> None:
    # Imported here: a warm start needs no checkpoint format and no builder of tokenizers.
    from engine.weights.checkpoint import open_checkpoint
    from engine.weights.convert import convert

    with open_checkpoint(located.path) as checkpoint:
        info, tensors = convert(checkpoint, quantization=quantization)
        made_from = pack.Source(
            name=readable(os.path.basename(os.path.abspath(located.path))),
            sha256=checkpoint.sha256(),
            stamp=located.stamp,
            origin=readable(source.origin),
            commit=located.commit,
            quantization=quantization,
        )
        write_packed(target, name=source.name, info=info, source=made_from, tensors=tensors, progress=progress)
