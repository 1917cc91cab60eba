"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from server.kinds import Kind


class Model(BaseModel):
    """One served model.

    `max_model_len` is the longest context in tokens. `root` is what the model was loaded from, without the folders of
    this machine; load generators take their tokenizer by it where they are given none. `generation_defaults` are the
    sampling fields that a request gets where it leaves them out. `kind` is what it is for ("generate": chat and
    completions, "embed": embeddings), `state` whether it would take a request now: ready, or starting, restarting,
    draining, dead. `tool_format` is how the model writes calls of tools, `reasoning` whether its answers may begin with
    some.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "seraph"
    root: str
    parent: None = None
    max_model_len: int
    generation_defaults: dict[str, float]
    kind: Kind
    state: str
    tool_format: str | None
    reasoning: bool


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
