"""The operator's requests: loading and unloading models, and what is told of them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from engine.config import MEMORY_FORMS, parse_memory
from engine.errors import RequestError
from server.kinds import Kind
from server.schemas.common import RequestBody
from server.schemas.fields import WORKS, Inspection, Table

MAX_NAME = 256
NAME = r"^[^\x00-\x20\x7f]+$"
"""Of a model in the API: no spaces, nothing that does not print."""


def _memory(value: object) -> object:
    """A size or a share, as `--kv-cache-memory` takes them; a number is bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        try:
            parse_memory(value)
        except ValueError:
            raise ValueError(f"should be {MEMORY_FORMS}") from None
    return value


class LoadModelRequest(RequestBody):
    """A model to load beside the others."""

    fields: ClassVar[Table] = {"model": WORKS, "name": WORKS, "kv_cache_memory": WORKS}

    model: str = Field(min_length=1, max_length=4096, description="An alias of the catalogue, or a source.")
    name: str | None = Field(
        None, pattern=NAME, max_length=MAX_NAME, description="Its name in the API; by default the source's."
    )
    kv_cache_memory: Annotated[str | None, BeforeValidator(_memory)] = Field(
        None,
        description=f"{MEMORY_FORMS[0].upper()}{MEMORY_FORMS[1:]}; by default what an engine alone takes, at most a "
        "quarter of what is left.",
    )

    def inspect(self) -> Inspection:
        """What is misspelled here would change what the server is: no name is unknown."""
        found = super().inspect()
        if found.unknown:
            name = found.unknown[0][:MAX_NAME]
            raise RequestError(f"{name!r} is not a field of this request.", param=name, code="unknown_parameter")
        return found


class Progress(BaseModel):
    """What is being fetched, unpacked or packed, and how far it is. `total_bytes` null: nobody knows."""

    label: str
    done_bytes: int
    total_bytes: int | None


class AdminModel(BaseModel):
    """A model as the operator sees it.

    `state` is fetching, packing, starting or cancelled on its way in, failed (with its `reason`) where it did not get
    there, then ready, restarting, dead (it died too often and is not started again) or draining (on its way out).
    `pid` is its engine process, `host` the model whose process an encoder lives in.
    """

    object: Literal["model"] = "model"
    name: str
    names: list[str]
    source: str
    kind: Kind | None
    state: str
    reason: str | None = None
    progress: Progress | None = None
    host: str | None = None
    pid: int | None
    weights_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_model_len: int | None


class Memory(BaseModel):
    """What the server and its engines may use, and what models were promised of it, in bytes."""

    limit_bytes: int
    promised_bytes: int


class AdminModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdminModel]
    memory: Memory
