"""The form of an answer, in every way a request can ask for it: the OpenAI API's, vLLM's, and vLLM's older names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from engine.errors import RequestError
from engine.request import IGNORE_EOS_REASON, StructuredOutputs
from server.schemas.body import Body
from server.schemas.fields import (
    JSON_SCHEMA_FIELDS,
    RESPONSE_FORMAT_FIELDS,
    STRUCTURED_OUTPUT_FIELDS,
    Inspection,
    inspect,
)


def _schema(value: Any) -> Any:
    if value is not None and not isinstance(value, str | dict):
        raise ValueError("must be a JSON schema: an object, or one as text")
    return value


Schema = Annotated[Any, BeforeValidator(_schema)]


class JsonSchema(Body):
    """A schema, which answers keep to, `strict` or not."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The OpenAI API's way."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputsBody(Body):
    """vLLM's way."""

    json_: Schema = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None


class StructuredBody(Body):
    """The fields of a request that say what form its answer has."""

    response_format: ResponseFormat | None = Field(None, description="text, json_object or json_schema.")
    structured_outputs: StructuredOutputsBody | None = Field(
        None, description="One of json (a schema), json_object, regex, choice and grammar (Lark or GBNF)."
    )
    guided_json: Schema = Field(None, description="Older name of structured_outputs.json.")
    guided_regex: str | None = Field(None, description="Older name of structured_outputs.regex.")
    guided_choice: list[str] | None = Field(None, description="Older name of structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="Older name of structured_outputs.grammar.")

    def inspect_form(self, *, ignore_eos: bool) -> Inspection:
        """Class the names within these fields. Raises RequestError where they, or `ignore_eos`, do not go together."""
        found = Inspection()
        if (form := self.response_format) is not None:
            found += inspect(RESPONSE_FORMAT_FIELDS, form.model_extra or {}, "response_format.")
            if form.json_schema is not None:
                extra = form.json_schema.model_extra or {}
                found += inspect(JSON_SCHEMA_FIELDS, extra, "response_format.json_schema.")
        if self.structured_outputs is not None:
            extra = self.structured_outputs.model_extra or {}
            found += inspect(STRUCTURED_OUTPUT_FIELDS, extra, "structured_outputs.")
        if self.asked_form() is not None and ignore_eos:
            raise RequestError(IGNORE_EOS_REASON, param="ignore_eos")
        return found

    def asked_form(self) -> tuple[StructuredOutputs, str] | None:
        """The form and the name of the field that asks for it; None where any answer will do.

        Raises RequestError where there are two, or where one is incomplete.
        """
        asked: list[tuple[StructuredOutputs, str]] = []
        if self.response_format is not None and (of_format := _of_format(self.response_format)) is not None:
            asked.append(of_format)
        if (how := self.structured_outputs) is not None:
            form = StructuredOutputs(
                json=how.json_,
                json_object=bool(how.json_object),
                regex=how.regex,
                choice=None if how.choice is None else tuple(how.choice),
                grammar=how.grammar,
                disable_any_whitespace=bool(how.disable_any_whitespace),
            )
            asked.append((form, "structured_outputs"))
        if self.guided_json is not None:
            asked.append((StructuredOutputs(json=self.guided_json), "guided_json"))
        if self.guided_regex is not None:
            asked.append((StructuredOutputs(regex=self.guided_regex), "guided_regex"))
        if self.guided_choice is not None:
            asked.append((StructuredOutputs(choice=tuple(self.guided_choice)), "guided_choice"))
        if self.guided_grammar is not None:
            asked.append((StructuredOutputs(grammar=self.guided_grammar), "guided_grammar"))
        if len(asked) > 1:
            names = " and ".join(name for _, name in asked)
            raise RequestError(f"Only one of {names} can say what form the answer has.", param=asked[1][1])
        return asked[0] if asked else None


def _of_format(form: ResponseFormat) -> tuple[StructuredOutputs, str] | None:
    match form.type:
        case "text":
            return None
        case "json_object":
            return StructuredOutputs(json_object=True), "response_format"
        case "json_schema":
            if form.json_schema is None or form.json_schema.schema_ is None:
                param = "response_format.json_schema" + ("" if form.json_schema is None else ".schema")
                raise RequestError(f"{param} is missing.", param=param, code="missing_required_parameter")
            return StructuredOutputs(json=form.json_schema.schema_), "response_format.json_schema.schema"
    raise RequestError(
        f"response_format.type must be text, json_object or json_schema, got {form.type[:64]!r}.",
        param="response_format.type",
        code="unsupported_parameter",
    )
