"""Settings as the parameters of a command: flags from their declarations, grouped in its help, known to the shell."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from engine.errors import ConfigError, FormatError, SeraphError, UnsupportedModelError
from server.options import SOURCE, Option
from server.settings import options, resolve

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
WRONG_CONFIG = 2


@contextmanager
def told() -> Iterator[None]:
    """Expected errors become one line and an exit status: 2 for a wrong setting or a model that cannot be used, which
    will be so again, 1 for the rest, 130 for Ctrl-C."""
    try:
        yield
    except (ConfigError, FormatError, UnsupportedModelError) as error:
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


class SettingsCommand(TyperCommand):
    """A command that takes settings: its help has a section for each group, and greedy flags take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # which is for completion, where a flag's value is still to come
            args = repeat_greedy(args, [one.flag for one in options() if one.greedy])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups = {one.name: one.group for one in options()}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(groups.get(parameter.name or "", "Options"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def repeat_greedy(args: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Arguments with each of `flags` before every one of its values: what follows it, up to the next flag.

    So does argparse's nargs="+"; a positional argument must come before such a flag or after another one. Raises
    BadParameter for a flag that nothing follows.
    """
    repeated: list[str] = []
    flag, num_values = "", 0
    for place, arg in enumerate([*args, "--"]):
        if arg.startswith("-") and arg != "-":
            if flag and not num_values:
                raise typer.BadParameter("it needs at least one value.", param_hint=flag)
            if arg == "--":
                return [*repeated, *args[place:]]
            flag, num_values = (arg, 0) if arg in flags else ("", 0)
            repeated += [] if flag else [arg]
        elif flag:
            repeated += [flag, arg]
            num_values += 1
        else:
            repeated.append(arg)
    raise AssertionError("the loop ends at --")


def _parameter(declared: Option) -> inspect.Parameter:
    """A setting as a parameter of a command. All default to None: only `resolve` knows what beats what."""
    default = f"default: {declared.default_text}" if declared.default is not False and declared.default_text else ""
    notes = "; ".join(filter(None, (default, f"env: {declared.environment_name}")))
    shared: dict[str, Any] = {"help": f"{declared.help} [{notes}]", "show_default": False}
    if declared.kind.choices:
        shared["autocompletion"] = completing(partial(iter, declared.kind.choices))
    elif declared.kind is SOURCE:
        shared["autocompletion"] = completing(known_models)
    kind: Any = list[str] | None if declared.repeatable else str | None
    if declared.positional:
        metavar = f"[{declared.flag}]{'...' * declared.repeatable}"
        info: Any = typer.Argument(metavar=metavar, **shared)
    elif declared.is_switch:
        kind, info = bool | None, typer.Option(f"{declared.flag}/--no-{declared.flag[2:]}", **shared)
    else:
        metavar = declared.kind.metavar + " ..." * declared.greedy
        info = typer.Option(declared.flag, metavar=metavar, **shared)
    return inspect.Parameter(
        declared.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info]
    )


def completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """For a parameter that takes one of `names`: how the shell completes it.

    Where a command offers nothing, shells complete files and folders, so no name here needs to be a path.
    """

    def complete(incomplete: str) -> list[str]:
        logging.disable()  # whatever is wrong: a message in the middle of a line that is being typed helps nobody
        try:
            return [name for name in names() if name.startswith(incomplete)]
        except Exception:
            return []
        finally:
            logging.disable(logging.NOTSET)

    return complete


def known_models() -> list[str]:
    """Models that go by a name: the catalogue's, and those that were fetched to this machine."""
    from engine.weights import known

    return known()
