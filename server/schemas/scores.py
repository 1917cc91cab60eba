"""POST /v1/score and /v1/rerank: how well texts go together, by a cross-encoder."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from engine.errors import RequestError
from server.schemas.embeddings import MAX_TEXTS, TextsBody
from server.schemas.fields import RERANK_FIELDS, SCORE_FIELDS, Inspection, Table

Texts = str | list[str]


class ScoreRequest(TextsBody):
    """Pairs of texts, as vLLM has them: one with each of many, or many with as many."""

    fields: ClassVar[Table] = SCORE_FIELDS

    text_1: Texts = Field(description="A text, or as many as text_2 has.")
    text_2: Texts = Field(description="A text, or a list of them.")

    def inspect(self) -> Inspection:
        found = super().inspect()
        self.pairs()
        return found

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs to be scored. Raises RequestError where the texts make none."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second) or not 1 <= len(second) <= MAX_TEXTS:
            raise RequestError(
                f"text_1 must be one text or as many as text_2, 1 to {MAX_TEXTS}, got {len(first)} and {len(second)}.",
                param="text_1",
            )
        return list(zip(first, second, strict=True))


class TextsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: TextsUsage


class RerankRequest(TextsBody):
    """Documents to be put in the order in which they answer a query, as Jina and Cohere have it."""

    fields: ClassVar[Table] = RERANK_FIELDS

    query: str
    documents: list[str] = Field(min_length=1, max_length=MAX_TEXTS)
    top_n: int | None = Field(None, ge=1, description="Only the best; by default all.")
    return_documents: bool | None = Field(None, description="Put their texts into the answer; by default yes.")

    def pairs(self) -> list[tuple[str, str]]:
        """The query with each document."""
        return [(self.query, document) for document in self.documents]


class RankedText(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int
    document: RankedText | None = None
    relevance_score: float


class RerankResult(BaseModel):
    id: str
    model: str
    usage: TextsUsage
    results: list[Ranked]
