"""Fetching from a hub: a small one of our own on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import SourceError, UnsupportedModelError
from engine.weights import hub
from engine.weights.hub import HubCheckpoint
from engine.weights.hub_client import HubClient
from engine.weights.hub_listing import Listing, RemoteFile, choose
from engine.weights.progress import NoProgress
from tests.engine.weights.hubs import Hub, serve_hub
from tests.engine.weights.recording import Recorded

ROOT = Path(__file__).parents[3]
REPO = "org/tiny"
GGUF = bytes(range(256)) * 1500
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
FOLDER = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"one" * 30_000,
    "model-00002-of-00002.safetensors": b"two" * 30_000,
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
}
UNWANTED = {
    "README.md": b"read me",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"twice",
    "original/consolidated.safetensors": b"thrice",
    "onnx/model.onnx": b"onnx",
    "model.pt": b"pickled",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve_hub() as running:
        yield running


@pytest.fixture
def remote(server: Hub) -> Iterator[Hub]:
    fresh = Hub(url=server.url, cdn=server.cdn)
    vars(server).update(vars(fresh))
    yield server
    assert server.statuses == server.break_after == [], "a test prepared failures that did not happen"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


class Pauses(list[float]):
    """Waits for nothing, and remembers for how long it was asked to."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client(remote: Hub, *, token: str = "", pause: Pauses | None = None, timeout: float = 30.0) -> HubClient:
    return HubClient(endpoint=remote.url, token=token, timeout=timeout, pause=Pauses() if pause is None else pause)


def fetch(remote: Hub, home: Path, wanted: HubCheckpoint | None = None, **options: object) -> hub.Record:
    asked = {name: options.pop(name) for name in ("token", "pause", "timeout") if name in options}
    progress = options.pop("progress", NoProgress())
    wanted = wanted or HubCheckpoint(REPO)
    return hub.fetch(wanted, home, progress, client=client(remote, **asked), **options)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_folder_is_fetched_without_what_is_not_read(remote: Hub, home: Path) -> None:
    commit = remote.repository(REPO).commit(FOLDER | UNWANTED)
    progress = Recorded()
    record = fetch(remote, home, progress=progress)
    folder = record.path(home)
    assert folder == home / "hub" / "org--tiny" / commit
    assert names(folder) == sorted(FOLDER)
    assert all((folder / name).read_bytes() == data for name, data in FOLDER.items())
    assert record.listing.commit == commit
    rest = sum(map(len, FOLDER.values())) - len(FOLDER["model.safetensors.index.json"])
    assert progress.work[-1] == (f"Fetching hf:{REPO}", rest, rest)


def test_what_was_fetched_is_not_asked_for_again(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit(FOLDER)
    first = fetch(remote, home)
    remote.requests.clear()
    progress = Recorded()
    assert fetch(remote, home, progress=progress) == first
    assert not remote.requests
    assert not progress.work


def test_the_only_gguf_file_is_taken(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"deep/model.Q8_0.gguf": GGUF, "config.json": b"{}", "model.bin": b""})
    record = fetch(remote, home)
    assert record.path(home).name == "model.Q8_0.gguf"
    assert record.path(home).read_bytes() == GGUF
    assert remote.fetched() == ["deep/model.Q8_0.gguf"]


def test_a_named_file_at_a_tag(remote: Hub, home: Path) -> None:
    repository = remote.repository(REPO)
    commit = repository.commit({"a.gguf": GGUF, "b.gguf": b"b"}, ref="refs/pr/1")
    repository.commit({"a.gguf": b"newer"})
    record = fetch(remote, home, HubCheckpoint(REPO, "refs/pr/1", "a.gguf"))
    assert (record.listing.commit, record.path(home).read_bytes()) == (commit, GGUF)


def test_a_commit_is_never_looked_up_again(remote: Hub, home: Path) -> None:
    commit = remote.repository(REPO).commit({"a.gguf": GGUF})
    wanted = HubCheckpoint(REPO, commit)
    fetch(remote, home, wanted)
    remote.requests.clear()
    fetch(remote, home, wanted, refresh=True)
    assert remote.requests == []


def test_a_branch_that_moved(remote: Hub, home: Path) -> None:
    repository = remote.repository(REPO)
    old = repository.commit(FOLDER)
    first = fetch(remote, home)
    changed = b"new" * 30_000
    new = repository.commit(FOLDER | {"model-00002-of-00002.safetensors": changed})
    assert fetch(remote, home) == first  # only a pull looks
    remote.requests.clear()
    second = fetch(remote, home, refresh=True)
    assert remote.fetched() == ["model-00002-of-00002.safetensors"]  # the rest has not changed
    assert (second.path(home) / "model-00002-of-00002.safetensors").read_bytes() == changed
    assert first.stamp != second.stamp
    assert not (home / "hub" / "org--tiny" / old).exists()
    assert names(home / "hub" / "org--tiny" / new) == sorted(FOLDER)
    assert len(list((home / "hub/org--tiny/blobs").iterdir())) == len(set(FOLDER.values()))


def test_a_commit_that_changes_no_file_that_is_read_is_the_same_model(remote: Hub, home: Path) -> None:
    repository = remote.repository(REPO)
    repository.commit(FOLDER)
    first = fetch(remote, home)
    commit = repository.commit(FOLDER | UNWANTED)
    remote.requests.clear()
    second = fetch(remote, home, refresh=True)
    assert second.stamp == first.stamp
    assert second.listing.commit == commit
    assert remote.fetched() == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    remote.break_after = [100_000, 50_000]
    progress, pauses = Recorded(), Pauses()
    assert fetch(remote, home, progress=progress, pause=pauses).path(home).read_bytes() == GGUF
    assert [request.range for request in remote.requests if "/cdn/" in request.path] == [
        None,
        "bytes=100000-",
        "bytes=150000-",
    ]
    assert progress.work == [(f"Fetching hf:{REPO}", len(GGUF), len(GGUF))]
    assert pauses == [1.0, 1.0]


def test_the_next_run_goes_on_where_the_last_one_ended(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    remote.break_after = [200_000, *[0] * 5]
    with pytest.raises(SourceError, match=r"hf:org/tiny: .* cannot be reached .*what has arrived is kept"):
        fetch(remote, home)
    assert list(hub.records(home)) == []
    assert list(hub.unfinished(home)) == [("hf:org/tiny", 200_000)]
    remote.requests.clear()
    progress = Recorded()
    assert fetch(remote, home, progress=progress).path(home).read_bytes() == GGUF
    assert [request.range for request in remote.requests if "/cdn/" in request.path] == ["bytes=200000-"]
    assert progress.work == [(f"Fetching hf:{REPO}", len(GGUF), len(GGUF))]
    assert list(hub.unfinished(home)) == []


def test_a_hub_that_ignores_ranges_sends_the_whole_again(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    remote.ignores_ranges = True
    remote.break_after = [100_000]
    progress = Recorded()
    assert fetch(remote, home, progress=progress).path(home).read_bytes() == GGUF
    assert progress.work == [(f"Fetching hf:{REPO}", len(GGUF), len(GGUF))]


def test_the_token_goes_to_the_hub_and_to_nobody_else(remote: Hub, home: Path) -> None:
    remote.repository(REPO).private = True
    remote.repository(REPO).commit(FOLDER)
    fetch(remote, home, token="hf_good")
    sent = {(request.host.split(":")[0], request.authorization) for request in remote.requests}
    assert sent == {("127.0.0.1", "Bearer hf_good"), ("localhost", None)}


def test_busy_hubs_are_asked_again(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    remote.statuses = [503, 429]
    pauses = Pauses()
    assert fetch(remote, home, pause=pauses).path(home).read_bytes() == GGUF
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, r"answered 500: try again later"),
        (503, r"answered 503: try again later; what has arrived is kept"),
        (429, r"too many requests: wait, or set HF_TOKEN"),
        (403, r"does not let anonymous callers read it: set HF_TOKEN"),
        (418, r"answered 418"),
    ],
)
def test_answers_that_stay_bad(remote: Hub, home: Path, status: int, message: str) -> None:
    remote.statuses = [status] * (5 if status in (429, 500, 503) else 1)
    with pytest.raises(SourceError, match=f"hf:org/tiny: {remote.url}.* {message}"):
        fetch(remote, home)
    assert names(home) == ["hub/org--tiny.lock"]


def test_repositories_that_cannot_be_had(remote: Hub, home: Path) -> None:
    def refused(message: str, token: str = "", revision: str = "main", file: str | None = None) -> None:
        with pytest.raises(SourceError, match=message):
            fetch(remote, home, HubCheckpoint(REPO, revision, file), token=token)

    refused(r"hf:org/tiny was not found at http.*: check the spelling, or, if it is private, set HF_TOKEN to a token")
    refused(r"hf:org/tiny was not found.*the token in use \(HF_TOKEN or a login\) cannot see it", "hf_good")
    refused(r"does not accept the token in use", "hf_bad")
    repository = remote.repository(REPO)
    repository.commit({"a.gguf": GGUF, "b.gguf": b"b", "c.bin": b"c"})
    refused(r"hf:org/tiny has no revision 'v9': name a branch, a tag or a commit", revision="v9")
    refused(
        r"hf:org/tiny at main has no file 'x\.gguf'; its \.gguf files are: a\.gguf \(0\.4 MB\), b\.gguf", file="x.gguf"
    )
    repository.gated = True
    refused(r"hf:org/tiny is gated: accept its conditions at http.*/org/tiny, then set HF_TOKEN", file="a.gguf")
    repository.private = True
    refused(r"hf:org/tiny was not found")
    assert fetch(remote, home, HubCheckpoint(REPO, file="a.gguf"), token="hf_good").path(home).read_bytes() == GGUF


def test_a_hub_that_is_not_there(remote: Hub, home: Path) -> None:
    pauses = Pauses()
    nowhere = HubClient(endpoint="http://127.0.0.1:9", token="", pause=pauses)
    with pytest.raises(
        SourceError, match=r"hf:org/tiny: http://127\.0\.0\.1:9 cannot be reached .*: check the network"
    ):
        hub.fetch(HubCheckpoint(REPO), home, NoProgress(), client=nowhere)
    assert pauses == []
    remote.repository(REPO).commit({"a.gguf": GGUF})
    record = fetch(remote, home)
    assert hub.fetch(HubCheckpoint(REPO), home, NoProgress(), client=nowhere) == record
    with pytest.raises(SourceError, match="cannot be reached"):
        hub.fetch(HubCheckpoint(REPO), home, NoProgress(), client=nowhere, refresh=True)
    assert hub.complete(HubCheckpoint(REPO), home) == record


def test_a_hub_that_stops_answering(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    remote.hold_at = 0
    with pytest.raises(SourceError, match=r"did not answer within 0\.1 s"):
        fetch(remote, home, timeout=0.1)
    remote.release.set()


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"sha": "x", "siblings": []}', b'{"sha": 1}'])
def test_what_is_no_hub(remote: Hub, home: Path, body: bytes) -> None:
    with pytest.raises(SourceError, match=r"does not answer as a hub does .*: check HF_ENDPOINT"):
        client(remote)._parsed(body, REPO)


@pytest.mark.parametrize("sent", [GGUF[:-1] + b"x", GGUF + b"more", GGUF[:1000]])
def test_other_bytes_than_promised_are_not_kept(remote: Hub, home: Path, sent: bytes) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    remote.replaced = {"a.gguf": sent}
    with pytest.raises(
        SourceError, match=r"a\.gguf: expected 384000 bytes with checksum \w+, the hub sent .*: it was not"
    ):
        fetch(remote, home)
    assert hub.complete(HubCheckpoint(REPO), home) is None
    remote.replaced = {}
    assert fetch(remote, home).path(home).read_bytes() == GGUF


def test_a_small_file_with_other_bytes_is_not_kept(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit(FOLDER)
    remote.replaced = {"config.json": b"[]"}
    with pytest.raises(SourceError, match=r"config\.json: expected 2 bytes with checksum"):
        fetch(remote, home)


def test_no_space_is_noticed_before_anything_is_fetched(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    with pytest.raises(SourceError, match=r"no space left .*: fetching hf:org/tiny needs 0\.4 MB, 0\.3 MB are free"):
        fetch(remote, home, free=lambda _: 300_000)
    assert remote.fetched() == []


def test_two_at_once_share_one_fetch(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit(FOLDER)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch(remote, home), range(2))
    assert first == second
    assert sorted(remote.fetched()) == sorted(FOLDER)


# What is fetched, and what is removed


def listing(*paths: str) -> Listing:
    return Listing("0" * 40, tuple(RemoteFile(path, 1_000_000, "git-" + "0" * 40) for path in paths))


def chosen(*paths: str, file: str | None = None, index: bytes = b"{}") -> list[str]:
    found = choose(listing(*paths), file, repo=REPO, revision="main", read=lambda _: index)
    return [one.path for one in found]


def test_a_whole_file_of_weights() -> None:
    assert chosen("config.json", "model.safetensors", "x.gguf") == ["config.json", "model.safetensors"]
    shards = ("model.safetensors.index.json", "model-00001-of-00001.safetensors")  # the same weights once more
    assert chosen("config.json", "model.safetensors", *shards) == ["config.json", "model.safetensors"]
    assert chosen("config.json", "weights.safetensors") == ["config.json", "weights.safetensors"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("a.gguf", "b/c.gguf"), r"2 \.gguf files: name one, as hf:org/tiny:FILE\. They are: a\.gguf \(1\.0 MB\), b/c"),
        (
            ("config.json", "model.bin"),
            r"neither config\.json with safetensors nor a \.gguf file; it has: config\.json",
        ),
        ((), r"it has: none"),
        (("model.safetensors",), r"neither config\.json with safetensors"),
        (
            ("config.json", "a.safetensors", "b.safetensors"),
            r"expected model\.safetensors, .* found a\.safetensors .*, b",
        ),
        (("../../x.gguf", "/etc/y.gguf"), r"it has: none"),
        (tuple(f"{i}.bin" for i in range(30)), r"11\.bin \(1\.0 MB\) and 18 more"),
    ],
)
def test_repositories_without_one_checkpoint(paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        chosen(*paths)


@pytest.mark.parametrize(
    "index",
    [
        b"no",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "no.safetensors"}}',
        b'{"weight_map": {"a": "config.json"}}',
    ],
)
def test_an_index_that_makes_no_sense(index: bytes) -> None:
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json (cannot be read|names)"):
        chosen("config.json", "model.safetensors.index.json", "a.safetensors", index=index)


def test_parts_of_a_split_file_are_refused_before_they_are_fetched() -> None:
    with pytest.raises(UnsupportedModelError, match=r"x-00001-of-00003\.gguf: .*split over several files .*3 parts"):
        chosen("x-00001-of-00003.gguf", "x-00002-of-00003.gguf", file="x-00001-of-00003.gguf")
    assert chosen("x-00001-of-00001.gguf") == ["x-00001-of-00001.gguf"]


def test_what_one_source_names_stays_when_another_is_removed(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF, "b.gguf": b"b" * 1000})
    a, b = HubCheckpoint(REPO, file="a.gguf"), HubCheckpoint(REPO, file="b.gguf")
    fetch(remote, home, a)
    kept = fetch(remote, home, b)
    assert len(GGUF) <= hub.forget(a, home) < len(GGUF) + 1000
    assert list(hub.records(home)) == [kept]
    assert [path.name for path in (home / "hub/org--tiny/blobs").iterdir()] == [kept.listing.files[0].checksum]
    assert hub.forget(b, home) > 1000
    assert names(home) == ["hub/org--tiny.lock"]
    assert hub.forget(b, home) == 0


def test_a_record_that_is_damaged_is_fetched_again(remote: Hub, home: Path) -> None:
    remote.repository(REPO).commit({"a.gguf": GGUF})
    record = fetch(remote, home)
    (path,) = (home / "hub").glob("*/records/*.json")
    path.write_text("{")
    assert fetch(remote, home) == record


# Kills, in a process of its own

FETCH = """
import os, signal, sys
from pathlib import Path
from engine.weights import hub
from engine.weights.hub import HubCheckpoint
from tests.engine.weights.recording import Recorded

seen = 0
def advance():
    global seen
    seen += 1
    if seen == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
hub.fetch(HubCheckpoint("org/tiny"), Path(sys.argv[1]), Recorded(advance))
"""


@pytest.mark.parametrize("blocks", [4, 8])
def test_a_killed_fetch_is_gone_on_with(remote: Hub, home: Path, blocks: int) -> None:
    remote.repository(REPO).commit(FOLDER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": remote.url, "HF_HOME": str(home.parent)}
    process = subprocess.run([sys.executable, "-c", FETCH, str(home), str(blocks)], env=environment, timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(hub.records(home)) == []
    remote.requests.clear()
    record = fetch(remote, home)
    assert all((record.path(home) / name).read_bytes() == data for name, data in FOLDER.items())
    assert len(remote.fetched()) < len(FOLDER) or any(request.range for request in remote.requests)
    assert list(hub.unfinished(home)) == []


OFFLINE = """
import sys
from pathlib import Path
from engine.errors import SourceError
from engine.weights import hub
from engine.weights.hub import HubCheckpoint
from engine.weights.progress import NoProgress
try:
    print(hub.fetch(HubCheckpoint("org/tiny"), Path(sys.argv[1]), NoProgress()).listing.commit)
except SourceError as error:
    print(error)
print("huggingface_hub" in sys.modules)
"""


def test_offline(remote: Hub, home: Path) -> None:
    def run() -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home.parent)}
        command = [sys.executable, "-c", OFFLINE, str(home)]
        return subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True).stdout.splitlines()

    assert run() == ["hf:org/tiny is not complete on this machine, and HF_HUB_OFFLINE forbids to fetch it.", "True"]
    commit = remote.repository(REPO).commit({"a.gguf": GGUF})
    fetch(remote, home)
    assert run() == [commit, "False"]


LIBRARY = """
import sys
from huggingface_hub import HfApi, hf_hub_download
info = HfApi().model_info("org/tiny", revision="main", files_metadata=True)
print(info.sha, len(info.siblings))
print(open(hf_hub_download("org/tiny", "a.gguf", cache_dir=sys.argv[1]), "rb").read() == bytes(range(256)) * 1500)
"""


def test_the_loopback_hub_speaks_as_the_client_library_expects(remote: Hub, home: Path) -> None:
    commit = remote.repository(REPO).commit({"a.gguf": GGUF, "config.json": b"{}"})
    settings = {"HF_ENDPOINT": remote.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", LIBRARY, str(home)]
    done = subprocess.run(command, env={**os.environ, **settings}, timeout=60, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{commit} 2", "True"], done.stderr
