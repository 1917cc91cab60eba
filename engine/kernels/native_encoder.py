"""The compiled EncoderProgram: checked arrays in, a few layers at a time, embeddings or logits out."""

from __future__ import annotations

from typing import Any

from engine.kernels.batch import TextBatch, Weights
from engine.kernels.native import NativeProgram, TeamProgram, build, native_matrix, team_layout
from engine.kernels.validate import check_texts, check_weights
from engine.models.spec import EncoderSpec
from engine.ranks import Ranks


class NativeEncoder(TeamProgram):
    """The `EncoderProgram` of one native build; see `engine.kernels.create_encoder`.

    It runs on the threads of `beside`, between its steps, or on `ranks` of its own.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: Weights,
        *,
        max_tokens: int,
        ranks: Ranks,
        isa: str,
        beside: NativeProgram | None = None,
    ) -> None:
        check_weights(spec, weights)
        if max_tokens < spec.max_position or min(ranks.threads) < 1:
            raise ValueError(
                f"expected room for a text of {spec.max_position} tokens and at least 1 thread, got {max_tokens} and "
                f"{min(ranks.threads)}"
            )
        module = build(isa)
        if module is None:
            raise ValueError(f"the {isa} kernels are not installed")
        self.spec = spec
        self.max_tokens = max_tokens
        self.isa = isa
        self._module = module
        self._program: Any = module.EncoderProgram(
            shape=module.EncoderShape(
                num_layers=spec.num_layers,
                hidden=spec.hidden_size,
                num_heads=spec.num_heads,
                intermediate=spec.intermediate_size,
                vocab=spec.vocab_size,
                max_position=spec.max_position,
                num_types=spec.num_types,
                num_labels=spec.num_labels,
                norm_eps=spec.norm_eps,
                query_scale=spec.query_scale(),
                activation=getattr(module.EncoderActivation, spec.activation),
                pooling=getattr(module.Pooling, spec.pooling),
                normalize=spec.normalize,
            ),
            vectors={name: tensor.data for name, tensor in weights.items() if tensor.format is None},
            matrices={name: native_matrix(tensor) for name, tensor in weights.items() if tensor.format is not None},
            max_tokens=max_tokens,
            layout=team_layout(module, ranks),
            beside=None if beside is None else beside.native(isa),
        )

    def begin(self, batch: TextBatch) -> None:
        """See `EncoderProgram.begin`."""
        try:
            taken = self._program.begin(batch.token_ids, batch.types, batch.starts, batch.out)
        except TypeError:  # an array of another type
            taken = False
        if not taken:  # the build checks what this checks, and this says what it was
            check_texts(self.spec, batch, self.max_tokens)
            raise ValueError("the kernels refuse a batch that passes their checks in Python")

    def run(self, layers: int) -> bool:
        """See `EncoderProgram.run`."""
        try:
            done: bool = self._program.run(layers)
        except self._module.Stalled as error:
            raise self._stalled(error) from None
        return done
