"""`seraph pull | convert | models | rm`: the models on this machine."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.config import FOLDER_DTYPES
from server.parameters import completing, known_models, told

if TYPE_CHECKING:
    from engine.weights import InstalledModel


def _removable() -> list[str]:
    from engine.weights import installed

    return sorted({model.name for model in installed()})


def pull(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="An alias or another source.", autocompletion=completing(known_models)
        ),
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="none|int8|int4",
            help="What becomes of float weights. [default: as the catalogue says, else they stay]",
        ),
    ] = None,
) -> None:
    """Fetch models and make them ready, without serving them. What is ready already is compared with its origin.

    \b
    seraph pull smollm2-135m-instruct
    seraph pull hf:HuggingFaceTB/SmolLM2-360M-Instruct --quantization int8
    seraph pull hf:organization/name@v1.0:model.Q4_1.gguf
    """
    from engine.weights import load_model, sweep
    from engine.weights.progress_bar import RichProgress

    with told(), RichProgress() as bars:
        sweep()
        for source in sources:
            model = load_model(source, progress=bars, quantization=quantization, refresh=True)
            typer.echo(f"{model.name} is installed ({_megabytes(model.nbytes)}): {model.path}")
            model.close()


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An alias or another source, of GGUF.",
            autocompletion=completing(known_models),
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="|".join(FOLDER_DTYPES),
            help="What weights are rounded to.",
            autocompletion=completing(partial(iter, FOLDER_DTYPES)),
        ),
    ] = FOLDER_DTYPES[0],
    force: Annotated[bool, typer.Option("--force", help="Replace a model's folder that is there.")] = False,
) -> None:
    """Write a GGUF model as a Hugging Face folder, which vLLM and transformers load.

    Quantized weights become floats: the folder of a 4-bit model takes four times the bytes, and is no better.

    \b
    seraph convert smollm2-135m-instruct ./smollm2
    seraph convert ./model.Q4_K_M.gguf ./model --dtype float32
    """
    from engine.weights import export_folder
    from engine.weights.progress_bar import RichProgress

    with told(), RichProgress() as bars:
        path = export_folder(source, folder, dtype=dtype, force=force, progress=bars)
        nbytes = sum(file.stat().st_size for file in path.iterdir())
        typer.echo(f"{source} is converted ({_megabytes(nbytes)}): {path}")


def models(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, for programs.")] = False,
) -> None:
    """List the models on disk and those that can be pulled."""
    from engine.weights import sweep, unfinished

    with told():
        sweep()
        rows = _rows()
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        typer.echo(_table(rows))
        for source, nbytes in unfinished():
            typer.echo(
                f"\n{_megabytes(nbytes)} of unfinished fetches from {source}: "
                f"`seraph pull` goes on with them, `seraph rm {source}` drops them."
            )


def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="As listed, or the source.", autocompletion=completing(_removable)),
    ],
) -> None:
    """Remove models from this machine. Files and folders of your own stay.

    \b
    seraph rm smollm2-135m-instruct
    seraph rm hf:organization/name
    """
    from engine.weights import remove, sweep

    with told():
        sweep()
        for name, freed in remove(names):
            typer.echo(f"{name} is removed: {_megabytes(freed)} are free again.")


def _rows() -> list[dict[str, Any]]:
    """Everything that is installed, then what else the catalogue has."""
    from engine.weights import catalog, installed, parse

    described = {parse(entry.name).origin: entry for entry in catalog()}
    rows: list[dict[str, Any]] = []
    for model in installed():
        entry = described.pop(model.source, None)
        rows.append(
            {
                "name": model.name,
                "kind": model.kind,
                "bytes": model.nbytes,
                "format": model.format,
                "quantizations": sorted({one for one in model.packed.values() if one is not None}),
                "state": _state(model),
                "source": model.source,
                "commit": model.commit,
                "path": str(model.path),
                "description": entry.description if entry is not None else "",
            }
        )
    rows += [
        {
            "name": entry.name,
            "kind": entry.kind,
            "bytes": entry.nbytes,
            "format": entry.format,
            "quantizations": [],
            "state": "can be pulled",
            "source": origin,
            "commit": "",
            "path": "",
            "description": entry.description,
        }
        for origin, entry in described.items()
    ]
    return rows


def _state(model: InstalledModel) -> str:
    if model.packed:
        return "ready"
    if model.fetched is not None:
        return "fetched"
    return "to be packed again" if model.damaged else "converted"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [("NAME", "KIND", "SIZE", "FORMAT", "STATE", "WHERE")]
    for row in rows:
        packed_as = f" as {', '.join(row['quantizations'])}" if row["quantizations"] else ""
        where = row["path"] or row["source"]
        lines.append(
            (
                row["name"],
                row["kind"] or "?",
                _megabytes(row["bytes"]),
                row["format"] + packed_as,
                row["state"],
                where,
            )
        )
    name, kind, size, form, state = (max(len(line[i]) for line in lines) for i in range(5))
    return "\n".join(
        f"{a:<{name}}  {b:<{kind}}  {c:>{size}}  {d:<{form}}  {e:<{state}}  {f}".rstrip() for a, b, c, d, e, f in lines
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
