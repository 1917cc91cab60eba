"""What Seraph asks a Hugging Face hub: which files a repository has at a revision, and their bytes.

The client library gives what its users configure it for: endpoint, token, proxies, certificates, the offline switch,
and a name for each of the hub's refusals. Files are transferred here, because the library's own downloads start over
after a kill and are not compared with the checksums that the hub states.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import httpx2
import msgspec
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

from engine.errors import SourceError
from engine.weights.hub_listing import Listing, RemoteFile
from engine.weights.progress import Progress

logger = logging.getLogger(__name__)

_FOREIGN = (httpx2.HTTPError, httpx2.InvalidURL, OfflineModeIsEnabled)
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_ATTEMPTS = 5  # in a row without one new byte
_LONGEST_PAUSE = 8.0  # seconds
_MAX_LISTING_BYTES = 64 << 20


class _Lfs(msgspec.Struct):
    sha256: str


class _Sibling(msgspec.Struct, rename="camel"):
    rfilename: str
    size: int | None = None
    blob_id: str | None = None
    lfs: _Lfs | None = None


class _ModelInfo(msgspec.Struct):
    sha: str
    siblings: list[_Sibling]


class HubClient:
    """One hub. `endpoint`, `token` ("": none) and `timeout` (seconds without an answer) default to what the library is
    configured with: HF_ENDPOINT, HF_TOKEN or a login, HF_HUB_DOWNLOAD_TIMEOUT. `pause` waits some seconds.

    Both methods raise SourceError, which names the repository and says what to do.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        timeout: float | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = (get_token() if token is None else token) or ""
        self._timeout = timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._pause = pause

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of `repo` ("organization/name") at a branch, tag or commit."""
        url = f"{self._endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
        failures = 0
        while True:
            try:
                body = self._get(url)
            except _FOREIGN as error:
                failures += 1
                # Without a connection there is nothing to wait for; a hub that is there may recover.
                if failures == _ATTEMPTS or not _is_transient(error) or isinstance(error, httpx2.ConnectError):
                    raise self._explained(error, repo, revision) from error
                self._wait(failures, error)
            else:
                return self._parsed(body, repo)

    def download(self, repo: str, commit: str, file: RemoteFile, partial: Path, progress: Progress) -> None:
        """Bring `partial` to the whole of `file`, from where it stands, and verify it.

        `progress` is told of every byte once, of those that are there already too. What is incomplete stays for the
        next call to go on with; what is not the file that the hub promised is removed.
        """
        url = f"{self._endpoint}/{repo}/resolve/{commit}/{quote(file.path)}"
        told = failures = 0

        def report(position: int) -> None:
            nonlocal told
            position = min(position, file.size)
            if position > told:
                progress.advance(position - told)
                told = position

        with partial.open("ab") as output:
            while (start := output.seek(0, os.SEEK_END)) < file.size:
                report(start)
                problem: Exception | None = None
                try:
                    self._receive(url, file, output, report)
                except _FOREIGN as error:
                    problem = error
                failures = 0 if output.tell() > start else failures + 1
                if failures == _ATTEMPTS or (problem is not None and not _is_transient(problem)):
                    if problem is None:
                        raise _mismatch(file, f"{start} bytes")
                    raise self._explained(problem, repo, commit) from problem
                if problem is not None:
                    self._wait(failures + 1, problem)
            report(output.tell())
            os.fsync(output.fileno())
        _verify(file, partial)

    def _receive(self, url: str, file: RemoteFile, output: BinaryIO, report: Callable[[int], None]) -> None:
        """One attempt: append to `output` what follows its end."""
        start = output.tell()
        headers = {"range": f"bytes={start}-"} if start else {}
        with self._stream(url, headers, accepted=(416,)) as response:
            if response.status_code == 416:  # what there is ends before `start`
                output.truncate(0)
                raise _mismatch(file, f"{start} bytes or less")
            if start and not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                start = output.truncate(0)  # the hub does not know ranges and sends the whole
            length = response.headers.get("content-length", "")
            if length.isdecimal() and start + int(length) != file.size:
                output.truncate(0)
                raise _mismatch(file, f"{start + int(length)} bytes")
            for block in response.iter_bytes():
                output.write(block)
                report(output.tell())
                if output.tell() > file.size:
                    return  # the checksum cannot match any more

    def _get(self, url: str) -> bytes:
        body = bytearray()
        with self._stream(url, {}) as response:
            for block in response.iter_bytes():
                body += block
                if len(body) > _MAX_LISTING_BYTES:
                    raise SourceError(f"{url}: the answer has more than {_MAX_LISTING_BYTES} bytes.")
        return bytes(body)

    @contextmanager
    def _stream(self, url: str, headers: dict[str, str], accepted: tuple[int, ...] = ()) -> Iterator[httpx2.Response]:
        # Compressed answers cannot be resumed. The session takes the token off where it is redirected to another host.
        headers = {"user-agent": "seraph", "accept-encoding": "identity", **headers}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        with get_session().stream("GET", url, headers=headers, timeout=self._timeout) as response:
            if response.status_code not in accepted:
                hf_raise_for_status(response)
            yield response

    def _wait(self, failures: int, error: Exception) -> None:
        seconds = min(2.0 ** (failures - 1), _LONGEST_PAUSE)
        logger.info("trying again in %.0f s: %s", seconds, error)
        self._pause(seconds)

    def _parsed(self, body: bytes, repo: str) -> Listing:
        try:
            info = msgspec.json.decode(body, type=_ModelInfo)
            if not re.fullmatch("[0-9a-f]{40}", info.sha):
                raise ValueError(f"{info.sha!r} is no commit")
            return Listing(info.sha, tuple(map(_remote_file, info.siblings)))
        except ValueError as error:  # msgspec's errors among them
            raise SourceError(
                f"hf:{repo}: {self._endpoint} does not answer as a hub does ({error}): check HF_ENDPOINT."
            ) from error

    def _explained(self, error: Exception, repo: str, revision: str) -> SourceError:
        """What a user can do about it."""
        hub, source = self._endpoint, f"hf:{repo}"
        token = "the token in use (HF_TOKEN or a login)"
        match error:
            case OfflineModeIsEnabled():
                return SourceError(f"{source} is not complete on this machine, and HF_HUB_OFFLINE forbids to fetch it.")
            case GatedRepoError() if self._token:
                return SourceError(
                    f"{source} is gated, and {token} has no access: accept its conditions at {hub}/{repo} with that "
                    "account, or set HF_TOKEN to another account's."
                )
            case GatedRepoError():
                return SourceError(
                    f"{source} is gated: accept its conditions at {hub}/{repo}, then set HF_TOKEN to a token of that "
                    "account."
                )
            case RepositoryNotFoundError():
                private = f"{token} cannot see it" if self._token else "set HF_TOKEN to a token that can see it"
                return SourceError(
                    f"{source} was not found at {hub}: check the spelling, or, if it is private, {private}."
                )
            case RevisionNotFoundError():
                return SourceError(f"{source} has no revision {revision!r}: name a branch, a tag or a commit.")
            case RemoteEntryNotFoundError():
                return SourceError(f"{source}: a file that the hub listed is not there: {error.response.url}.")
            case DisabledRepoError():
                return SourceError(f"{source} has been disabled at {hub}.")
            case HfHubHTTPError():
                return SourceError(f"{source}: {self._status(error.response.status_code, token)}")
            case httpx2.TimeoutException():
                return SourceError(f"{source}: {hub} did not answer within {self._timeout:g} s; {_KEPT}")
            case httpx2.TransportError():
                return SourceError(f"{source}: {hub} cannot be reached ({error}): check the network; {_KEPT}")
        return SourceError(f"{source}: {hub}: {error}.")

    def _status(self, status: int, token: str) -> str:
        hub = self._endpoint
        if status == 401:
            return f"{hub} does not accept {token}." if self._token else f"{hub} wants a token: set HF_TOKEN."
        if status == 403:
            return f"{hub} does not let {token if self._token else 'anonymous callers'} read it: set HF_TOKEN."
        if status == 429:
            return f"{hub} answers too many requests: wait, or set HF_TOKEN for a higher limit; {_KEPT}"
        return f"{hub} answered {status}: try again later; {_KEPT}"


_KEPT = "what has arrived is kept."


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)


def _remote_file(sibling: _Sibling) -> RemoteFile:
    checksum = f"sha256-{sibling.lfs.sha256}" if sibling.lfs is not None else f"git-{sibling.blob_id}"
    if sibling.size is None or sibling.size < 0 or not re.fullmatch("sha256-[0-9a-f]{64}|git-[0-9a-f]{40}", checksum):
        raise ValueError(f"size or checksum of {sibling.rfilename!r} missing")
    return RemoteFile(sibling.rfilename, sibling.size, checksum)


def _verify(file: RemoteFile, path: Path) -> None:
    size = path.stat().st_size
    kind, _, expected = file.checksum.partition("-")
    # A git blob's name is the SHA-1 of its content after this header.
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    if size == file.size and digest.hexdigest() == expected:
        return
    path.unlink()
    raise _mismatch(file, f"{size} bytes with checksum {digest.hexdigest()}")


def _mismatch(file: RemoteFile, found: str) -> SourceError:
    checksum = file.checksum.partition("-")[2]
    return SourceError(
        f"{file.path}: expected {file.size} bytes with checksum {checksum}, the hub sent {found}: it was not kept. Try "
        "again later."
    )
