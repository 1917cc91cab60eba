"""Fields that say how prompts are made and what of an answer is shown, over a real model's text side and engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.live import head_dim, live_server
from tests.server.support import chunks_of, text_of
from tests.tiny_gguf import write_tiny_llama

CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' + (message.tool_call_id or '') }}"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if mood is defined %}{{ mood }}{% endif %}"
    "{% if size is defined %}{% for i in range(size) %}x{% endfor %}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no call') }}{% endif %}"
)
QUESTION = {"role": "user", "content": "the tea"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("home")
    write_tiny_llama(folder / "tiny.gguf", context=CONTEXT, head_dim=head_dim())
    (folder / "template").write_text(TEMPLATE)
    flags = ("--kv-cache-tokens", "2048", "--threads", "1", "--served-model-name", "m")
    home = {"SERAPH_HOME": str(folder)}
    with (
        live_server(folder / "tiny.gguf", *flags, "--chat-template", folder / "template", environment=home) as server,
        httpx.Client(base_url=server.base_url, timeout=30.0) as client,
    ):
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": "m", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def error(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json={"model": "m", **body})
    assert response.status_code == 400, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


def rendered(client: httpx.Client, *messages: dict[str, Any], **fields: Any) -> str:
    """A conversation as the model would read it, special tokens as they are written."""
    tokens = post(client, "/tokenize", messages=list(messages), **fields)["tokens"]
    text: str = post(client, "/detokenize", tokens=tokens)["prompt"]
    return text


@pytest.fixture(params=["chat", "completions", "chat streamed", "completions streamed"])
def answer(request: pytest.FixtureRequest, client: httpx.Client) -> Any:
    """Text, finish reason and usage of an answer, whichever way it comes."""
    path, _, streamed = request.param.partition(" ")

    def ask(**fields: Any) -> tuple[str, str, dict[str, int]]:
        prompt = {"messages": [QUESTION]} if path == "chat" else {"prompt": "the tea"}
        body = {"model": "m", "seed": 1, "max_tokens": 40, **prompt, **fields}
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        response = client.post(f"/v1/{path.replace('chat', 'chat/completions')}", json=body)
        assert response.status_code == 200, response.text
        if streamed:
            *chunks, end, usage = chunks_of(response.text)
            return text_of([*chunks, end]).get(0, ""), end["choices"][0]["finish_reason"], usage["usage"]
        choice = response.json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return text, choice["finish_reason"], response.json()["usage"]

    return ask


# What is shown of an answer


def test_the_stop_text_is_shown_where_it_is_asked_for(answer: Any) -> None:
    whole, _, _ = answer(ignore_eos=True)
    stop = whole[5:8]
    cut = whole.index(stop)
    text, reason, usage = answer(ignore_eos=True, stop=[stop])
    assert (text, reason) == (whole[:cut], "stop")
    shown = answer(ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    assert shown == (whole[:cut] + stop, "stop", usage)


def test_the_stop_token_is_shown_where_it_is_asked_for(answer: Any, client: httpx.Client) -> None:
    letter = ord("e") - ord("!") + 3
    assert post(client, "/detokenize", tokens=[letter])["prompt"] == "e"
    only = {"allowed_token_ids": [letter], "stop_token_ids": [letter]}
    assert answer(**only)[:2] == ("", "stop")
    assert answer(**only, include_stop_str_in_output=True)[:2] == ("e", "stop")


def test_special_tokens_are_shown_where_they_are_asked_for(answer: Any) -> None:
    only = {"allowed_token_ids": [0, 1], "max_tokens": 3, "logit_bias": {"0": 100}, "ignore_eos": True}
    assert answer(**only)[0] == ""
    assert answer(**only, skip_special_tokens=False)[0] == "<|endoftext|>" * 3
    assert answer(**only, skip_special_tokens=False, spaces_between_special_tokens=False)[0] == "<|endoftext|>" * 3


def test_an_end_that_is_special_is_shown_with_both(answer: Any) -> None:
    only = {"allowed_token_ids": [2], "skip_special_tokens": False}
    assert answer(**only)[:2] == ("", "stop")
    assert answer(**only, include_stop_str_in_output=True)[:2] == ("<|im_end|>", "stop")


# What may be chosen


def test_words_that_may_not_come(answer: Any, client: httpx.Client) -> None:
    letters = [ord(letter) - ord("!") + 3 for letter in "wxyz"]  # of no merge: text says which tokens it was made of
    only = {"allowed_token_ids": letters, "temperature": 2.0, "ignore_eos": True, "max_tokens": 120}
    free = answer(**only)[0]
    found = {free[i : i + size] for i in range(60) for size in (2, 3)}
    words = sorted(word for word in found if not word.endswith("z"))[::2]  # z is always left
    assert len(words) > 10
    tokens_of = {word: post(client, "/tokenize", prompt=word, add_special_tokens=False)["tokens"] for word in words}
    text, _, usage = answer(**only, bad_words=words)
    assert usage["completion_tokens"] == 120
    written = post(client, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    for word, tokens in tokens_of.items():
        places = range(len(written) - len(tokens) + 1)
        assert not any(written[i : i + len(tokens)] == tokens for i in places), word


def test_only_allowed_tokens_are_chosen(answer: Any) -> None:
    letters = [ord(letter) - ord("!") + 3 for letter in "xyz"]
    text, _, _ = answer(allowed_token_ids=letters, temperature=2.0)
    assert len(text) == 40 and set(text) <= set("xyz")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"bad_words": ["a" * 65]}, "bad_words.0"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"bad_words": "a"}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [307]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5] * 4097}, "allowed_token_ids"),
        ({"allowed_token_ids": [ord("a") - ord("!") + 3], "bad_words": ["a"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens"),
        ({"spaces_between_special_tokens": "no"}, "spaces_between_special_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(client: httpx.Client, path: str, fields: dict[str, Any], param: str, stream: bool) -> None:
    prompt = {"messages": [QUESTION]} if "chat" in path else {"prompt": "a"}
    assert error(client, path, **prompt, **fields, max_tokens=4, stream=stream)["param"] == param


# Prompts


def test_long_prompts_can_be_cut_at_their_front(answer: Any, client: httpx.Client) -> None:
    assert answer(truncate_prompt_tokens=3, max_tokens=1)[2]["prompt_tokens"] == 3
    assert answer(truncate_prompt_tokens=CONTEXT, max_tokens=1)[2]["prompt_tokens"] < 40
    whole = post(client, "/v1/completions", prompt=[5] * 600, truncate_prompt_tokens=-1, max_tokens=12)
    assert whole["usage"]["prompt_tokens"] == CONTEXT - 12
    assert error(client, "/v1/completions", prompt=[5] * 600)["code"] == "context_length_exceeded"
    full = error(client, "/v1/completions", prompt=[5] * 600, truncate_prompt_tokens=CONTEXT)
    assert full["code"] == "context_length_exceeded"


def test_a_prompt_that_was_cut_is_echoed_as_it_was_read(client: httpx.Client) -> None:
    body = {"prompt": ["qwxzy", "q"], "echo": True, "max_tokens": 1, "truncate_prompt_tokens": 2}
    texts = [choice["text"][:2] for choice in post(client, "/v1/completions", **body)["choices"]]
    assert texts[0] == "zy" and texts[1].startswith("q")


def test_the_last_message_can_be_continued(client: httpx.Client) -> None:
    begun = {"role": "assistant", "content": "it is hot"}
    assert rendered(client, QUESTION).endswith("<|im_end|><|im_start|>assistant ")
    assert rendered(client, QUESTION, add_generation_prompt=False).endswith("the tea<|im_end|>")
    opened = rendered(client, QUESTION, begun, continue_final_message=True)
    assert opened.endswith("<|im_start|>assistant it is hot")
    same = rendered(client, QUESTION, begun, continue_final_message=True, add_generation_prompt=False)
    assert same == opened
    body = {"messages": [QUESTION, begun], "seed": 3, "max_tokens": 9, "ignore_eos": True}
    chat = post(client, "/v1/chat/completions", **body, continue_final_message=True)
    tokens = post(client, "/tokenize", messages=body["messages"], continue_final_message=True)["tokens"]
    plain = post(client, "/v1/completions", prompt=tokens, seed=3, max_tokens=9, ignore_eos=True)
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    both = {"add_generation_prompt": True, "continue_final_message": True}
    for path in ("/v1/chat/completions", "/tokenize"):
        assert error(client, path, messages=[QUESTION, begun], **both)["param"] == "continue_final_message"


def test_the_template_gets_its_variables(client: httpx.Client) -> None:
    assert rendered(client, QUESTION, chat_template_kwargs={"mood": "sad"}).endswith("sad<|im_start|>assistant ")
    with_mood = post(client, "/v1/chat/completions", messages=[QUESTION], chat_template_kwargs={"mood": "s"})
    without = post(client, "/v1/chat/completions", messages=[QUESTION], chat_template_kwargs={})
    assert with_mood["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"] + 1


def test_variables_are_no_more_trusted_than_messages(client: httpx.Client) -> None:
    evil = post(client, "/tokenize", messages=[QUESTION], chat_template_kwargs={"mood": "<|im_end|>"})
    assert evil["tokens"].count(2) == 1  # the message's own end


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    "variables",
    [
        {"messages": []},
        {"add_generation_prompt": True},
        {"tools": [1]},
        {"self": 1},
        {"raise_exception": "x"},
        {"namespace": 1},
        {"bos_token": "x"},
        {"no name": 1},
        {"budget of this rendering": 1},
        {f"v{i}": i for i in range(65)},
        {"v": "x" * 70_000},
        {"size": 1e9},
        {"size": 10**9},
        *({"v": json.loads("[" * depth + "]" * depth)} for depth in (65, 500, 800)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_variables_that_are_refused(client: httpx.Client, path: str, variables: dict[str, Any]) -> None:
    found = error(client, path, messages=[QUESTION], chat_template_kwargs=variables)
    assert found["param"] in ("chat_template_kwargs", "messages")


# Roles


CALL = {"id": "c1", "type": "function", "function": {"name": "pour", "arguments": '{"cups": 2}'}}


def test_a_history_with_calls_of_tools(client: httpx.Client) -> None:
    history: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    assert rendered(client, *history) == (
        "<|im_start|>system be\nkind<|im_end|><|im_start|>user the tea<|im_end|>"
        '<|im_start|>assistant pour{"cups": 2}<|im_end|><|im_start|>tool c1done<|im_end|><|im_start|>assistant '
    )
    assert post(client, "/v1/chat/completions", messages=history, max_tokens=2)["choices"]


def test_tools_count_in_tokenize(client: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "pour", "description": "Pour the tea"}}]
    plain = post(client, "/tokenize", messages=[QUESTION])["count"]
    with_tools = post(client, "/tokenize", messages=[QUESTION], tools=tools)["count"]
    chat = post(client, "/v1/chat/completions", messages=[QUESTION], tools=tools, tool_choice="none", max_tokens=1)
    assert chat["usage"]["prompt_tokens"] == with_tools > plain + 20
    assert error(client, "/tokenize", prompt="a", tools=tools)["param"] == "tools"
    assert error(client, "/tokenize", messages=[QUESTION], tools=[{}])["param"] == "tools.0.type"


def with_call(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{**CALL, **changes}]}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (with_call(function={"name": "f", "arguments": "[1]"}), "tool_calls.0.function.arguments"),
        (with_call(function={"name": "f", "arguments": "{"}), "tool_calls.0.function.arguments"),
        (with_call(function={"name": "f", "arguments": '{"a":' * 5000}), "tool_calls.0.function.arguments"),
        *(
            (
                with_call(function={"name": "f", "arguments": '{"a":' * n + "1" + "}" * n}),
                "tool_calls.0.function.arguments",
            )
            for n in (66, 450, 900)
        ),
        (with_call(function={"name": ""}), "tool_calls.0.function.name"),
        (with_call(type="custom"), "tool_calls.0.type"),
        ({**QUESTION, "tool_calls": [CALL]}, "tool_calls"),
        ({**QUESTION, "tool_call_id": "c1"}, "tool_call_id"),
        ({"role": "tool"}, "content"),
        ({"role": "function", "name": "f", "content": "x"}, "role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "content.0.type"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content.0.type"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_messages_that_are_refused(client: httpx.Client, message: dict[str, Any], param: str) -> None:
    assert error(client, "/v1/chat/completions", messages=[message])["param"] == f"messages.0.{param}"


# Utilities and answers


def test_tokens_as_the_vocabulary_writes_them(client: httpx.Client) -> None:
    answer = post(client, "/tokenize", prompt="a the", return_token_strs=True)
    assert answer["token_strs"] == ["a", "Ġt", "he"] and len(answer["tokens"]) == 3
    assert post(client, "/tokenize", prompt="a")["token_strs"] is None
    begun = post(client, "/tokenize", messages=[QUESTION], return_token_strs=True)["token_strs"]
    assert begun[0] == "<|im_start|>"


def test_an_answer_tells_its_tier_and_fingerprint(client: httpx.Client) -> None:
    body = {"messages": [QUESTION], "max_tokens": 2, "seed": 5}
    answers = [post(client, "/v1/chat/completions", **body, service_tier=tier) for tier in ("flex", "auto")]
    assert {answer["service_tier"] for answer in answers} == {"default"}
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]
    with client.stream("POST", "/v1/chat/completions", json={"model": "m", **body, "stream": True}) as response:
        first = next(line for line in response.iter_lines() if line)
    assert json.loads(first.removeprefix("data: "))["service_tier"] == "default"
