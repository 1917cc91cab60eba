"""What vLLM's command line says of our settings. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.backends.vllm_options import OURS, VllmOptions
from engine.errors import ConfigError


def options(*arguments: tuple[str, str], pooling: bool = False) -> VllmOptions:
    return VllmOptions(folder=Path("/models/m"), model="m", pooling=pooling, arguments=arguments)


@pytest.mark.parametrize("pooling", [False, True])
def test_every_model_has_its_name_in_metrics_and_takes_priorities(pooling: bool) -> None:
    words = options(pooling=pooling).command_line()
    assert "--served-model-name=m" in words and "--model=/models/m" in words
    assert "--scheduling-policy=priority" in words
    assert ("--enable-prefix-caching" in words) is not pooling


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_is_ours_to_say_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--vllm-arg {name}: Seraph has a setting for it"):
        options((name, "1")).command_line()
