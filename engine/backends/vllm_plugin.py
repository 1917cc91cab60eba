"""What vLLM runs in each of its processes, by the entry point `vllm.general_plugins` of this distribution.

vLLM's engine process outlives a parent that is killed, with the model in its memory, and writes to the parent's
terminal. In processes that were not started by Seraph nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import signal

from engine.config import VLLM_LOG, VLLM_PARENT, environment_value

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """End with the parent, and write to the log file of the start. Called once in each process."""
    parent, log = environment_value(VLLM_PARENT), environment_value(VLLM_LOG)
    if not parent or not log or parent == str(os.getpid()):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it has died in the meantime
        os.kill(os.getpid(), signal.SIGKILL)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
