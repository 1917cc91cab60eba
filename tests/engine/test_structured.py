"""Answers held to a form, by the default model and by tiny ones: valid, the same in any company, and resumable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import jsonschema
import msgspec
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import RequestError
from engine.kernels import available_isas
from engine.llm import LLM
from engine.request import FinishReason, Request, SamplingParams, StructuredOutputs, TokenDelta
from engine.sampling.grammar import GrammarCompiler
from engine.text.model_text import ModelText
from engine.weights import PackedModel, load_model
from tests.engine.sampling.random_schemas import random_schema
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(progress=False, max_num_seqs=32, kv_cache_tokens=32 * 768) as llm:
        yield llm


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with GrammarCompiler() as compiler:
        yield compiler


def ask(llm: LLM, text: str, form: StructuredOutputs, **sampling: Any) -> str:
    fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": 200} | sampling
    (answer,) = llm.chat([{"role": "user", "content": text}], SamplingParams(**fields, structured_outputs=form))
    assert answer.finish_reason is FinishReason.STOP, answer
    return answer.text


def test_each_kind(llm: LLM) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}},
        "required": ["capital"],
    }
    schema["additionalProperties"] = False
    question = "What is the capital of France? Answer in JSON."
    assert json.loads(ask(llm, question, StructuredOutputs(json=schema)))["capital"]
    compact = ask(llm, question, StructuredOutputs(json=json.dumps(schema), disable_any_whitespace=True))
    assert compact == json.dumps(json.loads(compact), separators=(",", ":"), ensure_ascii=False)
    assert re.fullmatch(r"\d{4}-\d{2}", ask(llm, "When?", StructuredOutputs(regex=r"\d{4}-\d{2}")))
    assert ask(llm, "Is the sky blue?", StructuredOutputs(choice=("yes", 'n"o"'))) in ("yes", 'n"o"')
    assert re.fullmatch(r"[0-9]( [+*] [0-9])+", ask(llm, "Sum?", StructuredOutputs(grammar=SUM), temperature=1.0))
    short = ask(llm, "A JSON object.", StructuredOutputs(json_object=True), logit_bias=_favour(llm, "}"))
    assert isinstance(json.loads(short), dict)


SUM = 'root ::= digit (" " [+*] " " digit){1,3}\ndigit ::= [0-9]'


def test_what_else_a_request_asks_for_goes_along(llm: LLM) -> None:
    letters = StructuredOutputs(regex="[ab]{1,40}")
    assert len(ask(llm, "Letters.", letters, min_tokens=8, temperature=1.0)) >= 8
    token = llm.text.encode("b", add_special_tokens=False)[0]
    (answer,) = llm.generate("x", SamplingParams(stop_token_ids=(token,), max_tokens=50, structured_outputs=letters))
    assert set(answer.text) <= {"a", "b"}
    biased = ask(llm, "Yes or no?", StructuredOutputs(choice=("yes", "no")), logit_bias=_favour(llm, "no"))
    assert biased == "no"
    assert ask(llm, "x", StructuredOutputs(choice=("yes",)), min_tokens=30) == "yes"
    assert ask(llm, "x", StructuredOutputs(regex="ab[c-z]*"), stop=("b",), max_tokens=9) == "a"
    with pytest.raises(RequestError, match="ignore_eos cannot be true"):
        ask(llm, "x", letters, ignore_eos=True)
    with pytest.raises(RequestError, match="not supported: not"):
        ask(llm, "x", StructuredOutputs(json={"not": {}}))


def _favour(llm: LLM, text: str) -> dict[int, float]:
    return dict.fromkeys(llm.text.encode(text, add_special_tokens=False), 100.0)


def test_white_space_does_not_go_on(llm: LLM) -> None:
    """Not even where the model is made to like nothing better."""
    spaces = {i: 60.0 for i, piece in enumerate(llm.text.tokenizer.pieces) if piece and not piece.strip(b" \n\t\r")}
    assert len(spaces) > 20
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 2]}},
        "required": ["a", "b"],
    }
    schema["additionalProperties"] = False
    text = ask(llm, "JSON", StructuredOutputs(json=schema), logit_bias=spaces)
    assert json.loads(text) and 4 <= max(map(len, re.findall(r"\s+", text))) <= 16


# Of jsonschema's checks without further packages, those that know the whole of their format.
FORMATS = jsonschema.FormatChecker(formats=("email", "ipv4", "uuid"))


def exact(text: str) -> Any:
    """JSON whose numbers are what is written: as a float, 0.99999999999999999999 is not below 1."""
    return json.loads(text, parse_float=Decimal)


def check_random_schemas(llm: LLM, seeds: range) -> int:
    """How many answers ended by themselves; each of them satisfies its schema."""
    schemas = [random_schema(seed) for seed in seeds]
    prompts = [
        llm.text.encode_chat([{"role": "user", "content": f"Give an example of {json.dumps(schema)[:400]}"}])
        for schema in schemas
    ]
    samplings = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.3)[seed % 3], max_tokens=256, structured_outputs=StructuredOutputs(json=schema)
        )
        for seed, schema in zip(seeds, schemas, strict=True)
    ]
    num_stopped = 0
    for schema, answer in zip(schemas, llm.generate(prompts, samplings, progress=False), strict=True):
        if answer.finish_reason is FinishReason.STOP:
            num_stopped += 1
            jsonschema.Draft202012Validator(exact(json.dumps(schema)), format_checker=FORMATS).validate(
                exact(answer.text)
            )
    return num_stopped


def test_answers_satisfy_random_schemas(llm: LLM) -> None:
    assert check_random_schemas(llm, range(25)) >= 20


@pytest.mark.full
def test_answers_satisfy_500_random_schemas(llm: LLM) -> None:
    assert check_random_schemas(llm, range(1000, 1500)) >= 400


# What follows needs many steps and no sense: a tiny model, on every build.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    home = tmp_path_factory.mktemp("home")
    write_tiny_llama(home / "tiny.gguf", hidden=64, layers=2, context=512)
    return load_model(str(home / "tiny.gguf"), home=home)


FORMS = (
    StructuredOutputs(json={"type": "array", "items": {"enum": ["left", "right", "up"]}, "maxItems": 12}),
    StructuredOutputs(json_object=True),
    StructuredOutputs(regex=r"(ab|ba|[0-9]{2,3} )*"),
    StructuredOutputs(choice=("one", "two", "three")),
    StructuredOutputs(grammar='start: e\ne: "(" e ")" | NUMBER ("+" e)?\nNUMBER: /[0-9]+/'),
)


def requests(model: PackedModel, compiler: GrammarCompiler) -> list[Request]:
    grammars: list[str | None] = [*map(compiler.compile, FORMS), None]
    return [
        Request(
            request_id=f"r{index}",
            model=model.name,
            prompt_token_ids=[3 + (index * 7 + i) % 250 for i in range(1 + 17 * (index % 5))],
            sampling=SamplingParams(
                temperature=(0.0, 1.0, 0.8)[index % 3],
                max_tokens=60,
                min_tokens=5 * (index % 2),
                repetition_penalty=(1.0, 1.1)[index % 4 == 0],
            ),
            seed=index,
            grammar=grammars[index % len(grammars)],
        )
        for index in range(24)
    ]


def run(core: EngineCore, batch: list[Request]) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {request.request_id: [] for request in batch}
    for request in batch:
        core.add(request)
    while core.has_work:
        for delta in core.step():
            deltas[delta.request_id].append(delta)
    core.check_integrity()
    return deltas


def tokens(deltas: list[TokenDelta]) -> list[int]:
    assert deltas[-1].error is None
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("isa", available_isas())
def test_tokens_are_the_same_alone_and_in_a_crowd_and_after_a_resume(
    tiny: PackedModel, compiler: GrammarCompiler, isa: str
) -> None:
    batch = requests(tiny, compiler)
    config = EngineConfig(isa=isa, threads=1, kv_cache_tokens=32 * 200)
    core = EngineCore(config, tiny)
    try:
        alone = {request.request_id: tokens(run(core, [request])[request.request_id]) for request in batch}
        assert {name: tokens(deltas) for name, deltas in run(core, batch).items()} == alone
        assert core.stats().num_accepted_tokens > 0  # guesses were among them
        resumed = [
            msgspec.structs.replace(request, output_token_ids=alone[request.request_id][: 1 + index % 7])
            for index, request in enumerate(batch)
        ]
        for request, deltas in zip(resumed, run(core, resumed).values(), strict=True):
            assert [*request.output_token_ids, *tokens(deltas)] == alone[request.request_id]
    finally:
        core.close()
    small = EngineCore(
        EngineConfig(isa=isa, threads=1, kv_cache_tokens=192, max_num_batched_tokens=64, speculation="off"), tiny
    )
    try:
        assert {name: tokens(deltas) for name, deltas in run(small, batch).items()} == alone
        assert small.stats().num_preemptions > 0
    finally:
        small.close()


@pytest.mark.parametrize("isa", available_isas())
def test_prompts_are_scored_beside_and_with_a_grammar(tiny: PackedModel, compiler: GrammarCompiler, isa: str) -> None:
    plain = requests(tiny, compiler)
    scoring = [
        msgspec.structs.replace(
            request, sampling=msgspec.structs.replace(request.sampling, prompt_logprobs=2, logprobs=index % 3)
        )
        if index % 4
        else request
        for index, request in enumerate(plain)
    ]
    ungrammatical = [msgspec.structs.replace(request, grammar=None) for request in scoring]
    core = EngineCore(EngineConfig(isa=isa, threads=1, kv_cache_tokens=32 * 200), tiny)
    try:
        alone = {request.request_id: tokens(run(core, [request])[request.request_id]) for request in plain}
        scored = run(core, scoring)
        assert {name: tokens(deltas) for name, deltas in scored.items()} == alone
        for name, deltas in run(core, ungrammatical).items():
            assert scored[name][0].prompt_logprobs == deltas[0].prompt_logprobs
    finally:
        core.close()


def test_a_grammar_that_fails_ends_its_request_alone(tiny: PackedModel, compiler: GrammarCompiler) -> None:
    good, other, *_ = requests(tiny, compiler)
    bad = msgspec.structs.replace(other, request_id="bad", grammar='{"grammars":[{"lark_grammar":"start: none"}]}')
    worse = msgspec.structs.replace(other, request_id="worse", grammar="no grammar at all")
    wrong = msgspec.structs.replace(other, request_id="wrong", grammar=good.grammar, output_token_ids=[3, 4, 5])
    core = EngineCore(EngineConfig(threads=1, kv_cache_tokens=4096), tiny)
    try:
        alone = tokens(run(core, [good])[good.request_id])
        found = run(core, [bad, good, worse, wrong])
        assert tokens(found[good.request_id]) == alone
        for name in ("bad", "worse", "wrong"):
            (delta,) = found[name]
            assert delta.finish_reason is FinishReason.REFUSED and "grammar" in (delta.error or "")
        core.add(good)
        core.abort(good.request_id)  # while it is being compiled
        assert not core.has_work
        assert tokens(run(core, [good])[good.request_id]) == alone
    finally:
        core.close()


def test_a_form_and_allowed_tokens_that_exclude_each_other_are_refused(
    tiny: PackedModel, compiler: GrammarCompiler
) -> None:
    good, *_ = requests(tiny, compiler)
    (letter,) = ModelText.from_info(tiny.info).tokenizer.encode_text("z", add_bos=False)
    narrow = msgspec.structs.replace(
        good,
        request_id="narrow",
        grammar=compiler.compile(StructuredOutputs(choice=("ab",))),
        sampling=msgspec.structs.replace(good.sampling, allowed_token_ids=(letter,)),
    )
    core = EngineCore(EngineConfig(threads=1, kv_cache_tokens=4096), tiny)
    try:
        found = run(core, [narrow, good])
        (delta,) = found["narrow"]
        assert delta.finish_reason is FinishReason.REFUSED and "exclude" in (delta.error or "")
        assert tokens(found[good.request_id]) == tokens(run(core, [good])[good.request_id])
    finally:
        core.close()


def test_siblings_and_deadlines(tiny: PackedModel, compiler: GrammarCompiler) -> None:
    first = msgspec.structs.replace(requests(tiny, compiler)[4], group_id="g", prompt_token_ids=[5] * 70)
    siblings = [msgspec.structs.replace(first, request_id=f"s{i}", choice_index=i) for i in range(3)]
    core = EngineCore(EngineConfig(threads=1, kv_cache_tokens=4096), tiny)
    try:
        found = run(core, siblings)
        assert all(deltas[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for deltas in found.values())
        late = msgspec.structs.replace(first, request_id="late", deadline=1.0)
        (delta,) = run(core, [late])["late"]
        assert delta.finish_reason is FinishReason.DEADLINE
    finally:
        core.close()
