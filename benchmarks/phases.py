"""Where the time of steps goes: ms of each kind of phase of the kernels, and projections beside their own limits."""

from __future__ import annotations

from engine.core import EngineCore
from engine.kernels.native import NativeProgram
from engine.weights import PackedModel

PROJECTIONS = {"qkv": "qkv", "out": "o", "gate_up": "gate_up", "down": "down", "head": "head"}  # phase: tensor


class Phases:
    """The profile of a core's program over the steps since `start`."""

    def __init__(self, core: EngineCore, model: PackedModel) -> None:
        assert isinstance(core.program, NativeProgram)  # what the benchmarks' options promise
        self.program = core.program
        # Of each kind of projection, over all layers: bytes read a step, operations a row.
        self.projections: dict[str, tuple[int, int]] = {}
        tensors = {name: (t.data.nbytes, t.format) for name, t in model.weights.items()}
        tensors.setdefault("head", tensors["embed"])
        for phase, tensor in PROJECTIONS.items():
            if model.info.spec.num_experts and phase in ("gate_up", "down"):
                continue  # which experts' weights a step reads is not known
            own = [v for name, v in tensors.items() if name.split(".")[-1] == tensor]
            operations = sum(2 * fmt.n * fmt.k for _, fmt in own if fmt is not None)
            self.projections[phase] = sum(nbytes for nbytes, _ in own), operations

    def start(self) -> None:
        self.program.profile(True)

    def seconds(self) -> dict[str, float]:
        """Of each kind of phase that took any, in the order of a step."""
        return {name: value for name, value in self.program.phase_seconds().items() if value > 0}

    def shares(self, steps: int, rows: int, head_rows: int, read_gbs: float, int8_tops: float) -> dict[str, float]:
        """Of each projection, with so many rows in each of `steps` steps, the share of the limit that binds it."""
        seconds, shares = self.seconds(), {}
        for phase, (nbytes, operations) in self.projections.items():
            by_read = steps * nbytes / (read_gbs * 1e9)
            by_rate = steps * operations * (head_rows if phase == "head" else rows) / (int8_tops * 1e12)
            shares[phase] = max(by_read, by_rate) / seconds[phase]
        return shares
