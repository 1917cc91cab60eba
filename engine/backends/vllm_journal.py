"""The log of vLLM's processes: how far a start is, and what it failed by."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

STAGES = (
    ("Initializing a V1 LLM engine", "the engine process is there"),
    ("Starting to load model", "loading the weights"),
    ("Loading weights took", "the weights are loaded"),
    ("KV cache size", "the KV memory is divided"),
    ("Dynamo bytecode transform", "compiling"),
    ("torch.compile took", "compiled"),
    ("Capturing CUDA graphs", "capturing graphs"),
    ("init engine (", "warmed up"),
)
"""Words of vLLM's and what they mean."""

KEPT = 10
"""Logs of starts that failed or were killed, beside that of this one."""

_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception|Exit|Interrupt))(?:: (.*))?$", re.MULTILINE
)
_HOLLOW = ("Engine core initialization failed", "WorkerProc initialization failed", "Failed core proc")
"""What only says that another process has failed."""


class Journal:
    """One file for all processes of one start."""

    def __init__(self, folder: Path, model: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        old = sorted(folder.glob("vllm-*.log"), key=lambda path: path.stat().st_mtime)
        for path in old[: max(0, len(old) - KEPT)]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
        name = re.sub(r"[^\w.-]", "_", model)[:80]
        self.path = folder / f"vllm-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6:06}.log"
        self.config_path = self.path.with_suffix(".json")
        self.path.touch(0o600)
        self.config_path.write_text(json.dumps(self._logging_config()))
        self._read = 0
        self._reached: set[str] = set()

    def _logging_config(self) -> dict[str, object]:
        """For logging.config.dictConfig, in every one of the processes."""
        return {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"}},
            "handlers": {"file": {"class": "logging.FileHandler", "filename": str(self.path), "formatter": "line"}},
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }

    def news(self) -> list[str]:
        """Stages that were reached since the last call."""
        text = self._more()
        found = []
        for words, meaning in STAGES:
            if words in text and meaning not in self._reached:
                self._reached.add(meaning)
                found.append(meaning)
        return found

    def cause(self) -> str:
        """The first exception that the processes wrote of, as it says it itself; "" where there is none."""
        text = self.path.read_text(errors="replace")
        for match in _EXCEPTION.finditer(text):
            if not any(hollow in match[0] for hollow in _HOLLOW):
                return f"{match[1]}: {match[2]}" if match[2] else match[1]
        return ""

    def _more(self) -> str:
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read += end
        return data[:end].decode(errors="replace")

    def remove(self) -> None:
        """Of a start that went well, once its processes have ended."""
        self.path.unlink(missing_ok=True)
        self.config_path.unlink(missing_ok=True)
