"""Which model a benchmark takes, as options of its command line."""

from __future__ import annotations

import argparse

from engine.config import DEFAULT_MODEL, KV_DTYPES, QUANTIZATIONS
from engine.errors import SeraphError
from engine.weights import PackedModel, load_model
from engine.weights.progress_bar import RichProgress


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load` reads."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias or source (default: %(default)s)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of float weights (default: as they are stored)")
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_DTYPES, default=KV_DTYPES[0], help="of keys and values (default: %(default)s)"
    )


def load(parser: argparse.ArgumentParser, args: argparse.Namespace) -> PackedModel:
    """The model that the options name. Ends the command with its usage and the reason where there is none."""
    try:
        with RichProgress() as bars:
            return load_model(args.model, quantization=args.quantization, progress=bars)
    except SeraphError as error:
        parser.error(str(error))


def described(model: PackedModel) -> str:
    """Name, what its checkpoint stored, and what became of that, for titles."""
    quantization = model.source.quantization
    return f"{model.name}, {model.info.checkpoint_format}" + (f" as {quantization}" if quantization else "")
