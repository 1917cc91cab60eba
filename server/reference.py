"""docs/configuration.md, written from the settings' declarations: `python -m server.reference`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from server.options import Option
from server.settings import options

HEAD = """\
# Configuration

*This page is written from `server/settings.py` by `make docs`.*

Every setting of `seraph serve` has three names: a flag, a name in the environment, and a key in a configuration file. A
flag beats the environment, the environment beats the file, and the file beats the default. Flags that may be repeated
are lists in the file, and separated by commas in the environment; a switch is turned off by `--no-` before its name.
`seraph chat` takes those that concern its engine. `model` may be a single text in the file.

A wrong value, and a key that does not exist, ends the start with exit status 2 and a line that names the key, the value
and what is allowed. Names in the environment that begin with `SERAPH_` and mean nothing are warned about.

One more name in the environment has no flag: `SERAPH_HOME`, the folder that models are fetched and packed into
(`~/.cache/seraph`).

## A configuration file

`--config FILE`, or `SERAPH_CONFIG`, names a TOML file. Its keys are the settings' names, with `-` or `_`; it has no
tables. Paths in it are relative to the folder that the server is started in.
"""

EXAMPLE = """\
model = "smollm2-135m-instruct"
served-model-name = ["small", "default"]
generation-config = { temperature = 0.7, top_p = 0.95, repetition_penalty = 1.1, max_new_tokens = 1024 }

host = "127.0.0.1"
port = 9000
api-key = ["one-for-each-caller", "another"]

max-model-len = 4096
kv-cache-memory = "2GiB"
max-num-seqs = 32
threads = 8

drain-timeout = 10.5
log-format = "json"
"""
"""A file that a test loads."""

COLUMNS = ("flag", "environment", "key", "default", "allowed", "what it does")

TAIL = """\
## What requests get for the fields they leave out

A request that names no `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `presence_penalty`,
`frequency_penalty` or `max_tokens` gets, with `--generation-config auto`, what the model's checkpoint or the catalogue
says, and else the API's plain defaults: temperature 1, and everything else off. `/v1/models` and the table that a start
prints show what is in force. A request's own value always wins; it turns a default off by the value that means off
(`repetition_penalty` 1, `top_k` 0).

`--generation-config` with a file or an object takes those values *instead of* the model's. It reads the keys of Hugging
Face's `generation_config.json`: the names above, `max_new_tokens` for `max_tokens`, and `do_sample`, which when false
means temperature 0. Keys that ask for another way of decoding (`num_beams` above 1 and such) are warned about at the
start; token ids and the many other keys of such files are the checkpoint's own affair and are left alone.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD, f"```toml\n{EXAMPLE}```\n"]
    for group, declared in itertools.groupby(options(), key=lambda one: one.group):
        sections.append(f"## {group}\n\n{_table(declared)}")
    return "\n".join([*sections, TAIL])


def _table(declared: Iterable[Option]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_row, declared)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(declared: Option) -> tuple[str, ...]:
    flag = declared.flag.replace("--", "--[no-]", 1) if declared.is_switch else declared.flag
    shown, default = declared.shown_default, declared.default_text
    return (
        f"`{flag}`{' ...' * declared.greedy}",
        f"`{declared.environment_name}`",
        f"`{declared.key}`" if declared.in_file else "",
        shown or (f"`{default}`" if default else ""),
        declared.kind.allowed + ("; any number of them" if declared.repeatable else ""),
        declared.help,
    )


if __name__ == "__main__":
    print(page(), end="")
