"""Sentences embedded a second, beside sentence-transformers: `python -m benchmarks.embeddings --help`.

Both have the same model, the same sentences, of a text that is cut at its full stops, and the same number of threads,
and they take turns in one run: one computes while the other one's process waits for a word. What is measured is from
texts to vectors, tokenizing included. The peer is installed, once, into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import cpu_name, measure_limits, parse_options, write_json
from engine import LLM
from engine.models.spec import EncoderSpec
from engine.weights import resolve
from loadtests.peers.environments import python_of
from loadtests.peers.systems import Environment

MODEL = "all-minilm-l6-v2"
PEER = Environment(requirements=("torch==2.13.0", "transformers==5.24.0", "sentence-transformers==6.2.0"))
FOLDER = Path("~/.cache/seraph-peers/envs")
TEXT = Path(__file__).parents[1] / "tests" / "golden" / "perplexity.txt"
LONG_SENTENCES = 8  # of a paragraph, the second kind of text

PEER_PROGRAM = """
import json, sys, time
import torch
from sentence_transformers import SentenceTransformer

folder, threads, texts = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
torch.set_num_threads(threads)
model = SentenceTransformer(folder, device="cpu")
print("ready", flush=True)
for line in sys.stdin:
    given = texts[line.strip()]
    started = time.perf_counter()
    model.encode(given, batch_size=32, show_progress_bar=False)
    print(time.perf_counter() - started, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the turns, and the least and the largest ratio of a pair."""

    texts: str
    count: int
    tokens: float  # of a text, special ones included
    ours: float  # texts a second
    theirs: float
    ratio: float
    least: float
    largest: float
    tops: float  # operations of our projections, 10**12 a second


def sentences(path: Path) -> list[str]:
    """A text's sentences: what ends with a full stop, in one line, and is neither a heading nor a table."""
    prose = " ".join(path.read_text().split())
    found = re.split(r"(?<=[.!?]) (?=[A-Z])", prose)
    return [sentence for sentence in found if 20 <= len(sentence) <= 400]


@contextmanager
def peer(python: Path, folder: Path, threads: int, texts: dict[str, Sequence[str]]) -> Iterator[subprocess.Popen[str]]:
    """sentence-transformers in a process that embeds the texts whose name it is told, and tells the seconds."""
    with tempfile.TemporaryDirectory() as place:
        given = Path(place) / "texts.json"
        given.write_text(json.dumps(texts))
        command = [str(python), "-c", PEER_PROGRAM, str(folder), str(threads), str(given)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{python} could not load {folder}: is sentence-transformers installed there?")
            yield process
        finally:
            process.kill()
            process.wait()


def their_seconds(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def our_seconds(llm: LLM, texts: Sequence[str]) -> float:
    started = time.perf_counter()
    llm.embed(texts, progress=False, truncate=True)
    return time.perf_counter() - started


def operations(spec: EncoderSpec) -> int:
    """Of the projections of one token."""
    return 2 * spec.num_layers * (4 * spec.hidden_size**2 + 2 * spec.hidden_size * spec.intermediate_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="a virtual environment that has sentence-transformers")
    parser.add_argument("--text", type=Path, default=TEXT, help="prose whose sentences are embedded")
    args = parse_options(parser)
    console = Console()
    folder = resolve(MODEL)
    given = {} if args.environment is None else {"sentence-transformers": args.environment}
    place = FOLDER.expanduser()
    place.mkdir(parents=True, exist_ok=True)
    if not given:
        console.print(f"sentence-transformers goes into {place}, unless it is there")
    python = python_of("sentence-transformers", PEER, given=given, folder=place, logs=place)

    short = sentences(args.text)
    long = [" ".join(short[i : i + LONG_SENTENCES]) for i in range(0, len(short), LONG_SENTENCES)]
    texts: dict[str, Sequence[str]] = {"sentences": short, f"{LONG_SENTENCES} sentences": long}
    limits = measure_limits(args.isa, args.threads)
    figures = []
    with (
        LLM(MODEL, progress=False, threads=args.threads, isa=args.isa) as llm,
        peer(python, folder, args.threads, texts) as process,
    ):
        assert llm._encoder_text is not None
        spec = llm._model.info.spec
        for name, those in texts.items():
            tokens = sum(len(text.token_ids) for text in llm._encoder_text.encode_texts(those, truncate=-1))
            pairs = []
            for turn in track(range(args.repeats + 1), description=name, console=console, transient=True):
                pair = our_seconds(llm, those), their_seconds(process, name)
                if turn > 0:  # the first one warms both up
                    pairs.append(pair)
            ratios = [theirs / ours for ours, theirs in pairs]
            ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
            count = len(those)
            figures.append(
                Figures(
                    texts=name,
                    count=count,
                    tokens=tokens / count,
                    ours=count / ours,
                    theirs=count / theirs,
                    ratio=statistics.median(ratios),
                    least=min(ratios),
                    largest=max(ratios),
                    tops=operations(spec) * tokens / ours * 1e-12,
                )
            )
    show(console, figures, args, limits.int8_tops[args.threads])
    if args.json is not None:
        write_json(args.json, {"cpu": cpu_name(), "isa": args.isa, "figures": [asdict(each) for each in figures]})


def show(console: Console, figures: Sequence[Figures], args: argparse.Namespace, limit: float) -> None:
    table = Table(title=f"{MODEL}: {cpu_name()}, {args.isa}, {args.threads} threads, {args.repeats} pairs")
    for heading in ("texts", "number", "tokens", "ours /s", "sentence-transformers /s", "ratio", "share of int8 limit"):
        table.add_column(heading, justify="left" if heading == "texts" else "right")
    for each in figures:
        table.add_row(
            each.texts,
            str(each.count),
            f"{each.tokens:.0f}",
            f"{each.ours:,.0f}",
            f"{each.theirs:,.0f}",
            f"{each.ratio:.2f}x ({each.least:.2f} to {each.largest:.2f})",
            f"{each.tops / limit:.0%} of {limit:.2f} Tops",
        )
    console.print(table)


if __name__ == "__main__":
    main()
