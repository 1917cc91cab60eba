"""`seraph serve | chat | pull | models`: what people type. A command imports what is heavy when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from engine.errors import ConfigError, SeraphError
from server.settings import Option, Settings, options, resolve, version

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
WRONG_CONFIG = 2

app = typer.Typer(
    help="Serve language models over the OpenAI API.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@contextmanager
def told() -> Iterator[None]:
    """Expected errors become one line and an exit status: 2 for a wrong setting, 1 for the rest, 130 for Ctrl-C."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(WRONG_CONFIG) from None
    except SeraphError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one parameter per setting (all, or those named), in place of its `settings`.

    The parameters come from the declarations in server/settings.py; what the command declares itself follows them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = [one for one in options() if not names or one.name in names]
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "settings"]
        parameters = [_parameter(one) for one in declared] + [p.replace(kind=p.KEYWORD_ONLY) for p in own]

        def run(**given: Any) -> None:
            with told():
                flags = {one.name: given.pop(one.name) for one in declared}
                command(settings=resolve(flags), **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(declared: Option) -> inspect.Parameter:
    """A setting as a parameter of a command. All default to None: only `resolve` knows what beats what."""
    default = f"default: {declared.default}" if declared.default not in (None, (), False) else ""
    notes = "; ".join(filter(None, (default, f"env: {declared.environment_name}")))
    shared: dict[str, Any] = {"help": f"{declared.help} [{notes}]", "show_default": False}
    kind: Any = str | None
    if declared.positional:
        info: Any = typer.Argument(metavar=declared.flag, **shared)
    elif declared.is_switch:
        kind, info = bool | None, typer.Option(f"{declared.flag}/--no-{declared.flag[2:]}", **shared)
    else:
        kind = list[str] | None if declared.repeatable else str | None
        info = typer.Option(declared.flag, metavar=declared.kind.metavar, **shared)
    return inspect.Parameter(
        declared.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info]
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"seraph {version()}")
        raise typer.Exit()


@app.callback()
def seraph(
    show: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@takes_settings()
def serve(settings: Settings) -> None:
    """Serve a model over the OpenAI API.

    A flag beats its environment name, which beats the default.

    \b
    seraph serve
    seraph serve ./model.gguf --port 9000 --max-num-seqs 32
    SERAPH_API_KEY=secret seraph serve --host 0.0.0.0
    """
    from server import serving

    raise typer.Exit(serving.serve(settings))


@app.command()
@takes_settings("model", "api_key", "chat_template", "max_model_len", "threads", "isa")
def chat(
    settings: Settings,
    url: Annotated[str, typer.Option(help="A running server, as http://host:port; empty: an engine of its own.")] = "",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    temperature: Annotated[float, typer.Option(help="0 to 2; 0 always takes the best token.")] = 0.7,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
) -> None:
    """Talk to a model in the terminal.

    \b
    seraph chat
    seraph chat --url http://127.0.0.1:8000 --system "Answer in one sentence."
    """
    from engine.request import SamplingParams
    from server import terminal

    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    sampling.validate()
    terminal.chat(settings, url=url, sampling=sampling, system=system)


@app.command()
def pull(model: Annotated[str, typer.Argument(help="An alias of the catalogue, or a source.")]) -> None:
    """Fetch a model and make it ready, without serving it.

    \b
    seraph pull smollm2-135m-instruct
    """
    from server import serving

    with told():
        packed = serving.fetch(model)
        typer.echo(f"{packed.name} is installed ({_megabytes(packed.nbytes)}): {packed.path}")
        packed.close()


@app.command()
def models() -> None:
    """List the models that can be pulled and those on disk."""
    with told():
        typer.echo(_model_table())


def _model_table() -> str:
    """The catalogue's models and those on disk, one line each."""
    from engine.weights import catalog, installed

    found = {one.name: one for one in installed() if one.packed}
    rows = [("NAME", "SIZE", "STATE", "WHAT")]
    for entry in catalog():
        here = found.pop(entry.name, None)
        size, state = (entry.file_bytes, "can be pulled") if here is None else (here.nbytes, "installed")
        rows.append((entry.name, _megabytes(size), state, entry.description))
    rows += [(one.name, _megabytes(one.nbytes), "installed", str(one.path)) for one in found.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}".rstrip() for row in rows
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def main() -> None:
    """The `seraph` command."""
    app()


if __name__ == "__main__":
    main()
