"""`seraph serve | chat | doctor | pull | convert | models | rm`: what people type. Heavy imports wait for a command."""

from __future__ import annotations

from typing import Annotated

import typer

from server import library
from server.parameters import SettingsCommand, completing, known_models, takes_settings
from server.settings import Settings, version

app = typer.Typer(
    help="Serve language models over the OpenAI API.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
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


@app.command(cls=SettingsCommand)
@takes_settings()
def serve(settings: Settings) -> None:
    """Serve models over the OpenAI API.

    A flag beats its environment name, which beats the key of the same name in the --config file, which beats the
    default.

    \b
    seraph serve
    seraph serve ./model.gguf --port 9000 --kv-cache-memory 2GiB
    seraph serve smollm2-135m-instruct gemma3-270m
    seraph serve --config seraph.toml
    SERAPH_API_KEY=secret seraph serve --host 0.0.0.0
    """
    from server import serving

    raise typer.Exit(serving.serve(settings))


@app.command(cls=SettingsCommand)
@takes_settings(
    "model",
    "quantization",
    "chat_template",
    "generation_config",
    "api_key",
    "max_model_len",
    "kv_cache_memory",
    "kv_cache_tokens",
    "kv_cache_dtype",
    "huge_pages",
    "threads",
    "tensor_parallel_size",
    "stall_timeout",
    "isa",
    "config",
    "log_level",
    "log_format",
)
def chat(
    settings: Settings,
    url: Annotated[str, typer.Option(help="A running server, as http://host:port; empty: an engine of its own.")] = "",
    system: Annotated[str, typer.Option(help="What the model is told first.")] = "",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 to 2; 0 always takes the best token. "
            "[default: the generation config's, else 0.7 (with --url: the server's)]"
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
) -> None:
    """Talk to one model in the terminal; with --url and without a model to the first that the server lists.

    \b
    seraph chat
    seraph chat --url http://127.0.0.1:8000 --system "Answer in one sentence."
    """
    from server import terminal

    given = {"temperature": temperature, "max_tokens": max_tokens}
    asked = {name: value for name, value in given.items() if value is not None}
    terminal.chat(settings, url=url, asked=asked, system=system)


@app.command()
def doctor(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]",
            help="Models to look at; by default all in the cache.",
            autocompletion=completing(known_models),
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all of their data, and compare it with what it is from.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON, for programs.")] = False,
) -> None:
    """Examine this machine, the kernels, the cache and its models. Exits with 1 where something does not work.

    \b
    seraph doctor
    seraph doctor smollm2-135m-instruct --deep
    """
    from server.doctor import report

    raise typer.Exit(report.run(report.sections(models or (), deep=deep), json=as_json, write=typer.echo, deep=deep))


for _command in (library.pull, library.convert, library.models, library.rm):
    app.command()(_command)


def main() -> None:
    """The `seraph` command."""
    app()


if __name__ == "__main__":
    main()
