"""docs/configuration.md is what the declarations say, and its example is a file that works."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from server.reference import page
from server.settings import Settings, options, resolve

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "docs/configuration.md is stale: run `make docs`"


def test_the_page_has_every_name_of_every_setting() -> None:
    text = PAGE.read_text()
    for declared in options():
        assert f"`{declared.environment_name}`" in text
        assert f"`{declared.flag}`" in text or f"`--[no-]{declared.key}`" in text
        assert not declared.in_file or f"`{declared.key}`" in text
        assert declared.kind.allowed in text and declared.help in text


def test_groups_hold_together() -> None:
    groups = [declared.group for declared in options()]
    assert len(set(groups)) == sum(a != b for a, b in zip(groups, ["", *groups[:-1]], strict=True))


def test_the_example_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "seraph.toml").write_text(example)
    settings, default = resolve({"config": str(tmp_path / "seraph.toml")}, {}), Settings()
    settings.engine_configs()
    assert settings.generation_defaults() == {
        "temperature": 0.7,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "max_tokens": 1024,
    }
    assert settings.api_key == ("one-for-each-caller", "another")
    shown_as_they_are = {"model", "host"}
    for key in tomllib.loads(example):
        name = key.replace("-", "_")
        assert (getattr(settings, name) == getattr(default, name)) == (name in shown_as_they_are)
