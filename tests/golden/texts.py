"""What the tokenizer's golden data are made from: texts of many kinds, conversations, and chat templates."""

# ruff: noqa: RUF001  # look-alike characters are what some of these texts are for

from __future__ import annotations

from typing import Any

TEXTS = (
    "",
    " ",
    "The capital of France is Paris.",
    "the quick brown fox, it's; they'll; I'd've; DON'T",
    "Où est passé le garçon naïf ? Ça alors… « déjà vu » à l'œil nu, cœur français, Noël.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich: Straße, Füße, ÄÖÜ ẞ.",
    "Žluťoučký kůň; zażółć gęślą jaźń; İstanbul'da ığdır; ﬁne ﬂow",
    "e\u0301 is not \u00e9, and A\u030a is not \u00c5",
    "快速的棕色狐狸跳过懒狗。今天天气很好，我们去公园吧！",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。カタカナ ﾊﾝｶｸ",
    "다람쥐 헌 쳇바퀴에 타고파",
    "السلام عليكم، كيف حالك اليوم؟ ١٢٣٤٥",
    "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय ज्ञान १२३",
    "שלום עולם \u202bמימין לשמאל\u202c",
    "สวัสดีชาวโลก ไม่มีช่องว่าง",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "Ελληνικό αλφάβητο: ψωμί και νερό",
    "🙂🎉 👩‍👩‍👧‍👦 👨🏽‍💻 🏳️‍🌈 🇫🇷🇩🇪 ❤️ ☠ 1️⃣",
    "𝒜𝓁𝓁 𝕒𝕓𝕠𝕦𝕥 𝐦𝐚𝐭𝐡: ∀x∈ℝ ∃y: x² + y² ≤ r², ∑ᵢ₌₁ⁿ √π ≈ 1.7724538",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nclass A:\n\tdef __init__(self):\n\t\tself.x = 0x1F\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c->d; }\r\n/* done */\r\n",
    '{"key": [1, 2.5e-3, null, true], "nested": {"a": "\\u00e9\\n"}}',
    "<html><body class='x'>&lt;p&gt; &amp; </body></html>",
    "SELECT * FROM t WHERE id != 42 AND name LIKE '%x%';",
    "https://example.com/a/b?c=d&e=f#g mailto:someone@example.org C:\\Users\\x",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x7f 1e-9 v2.0.1 2024-02-29T23:59:59Z",
    "a1b22c333 x9  99   999    9999",
    "½ ⅓ ² ³ ① Ⅷ ٣ ३ 〇 一二三",
    "a b  c   d    e     f      g",
    "  leading, trailing  ",
    "tabs\there\t\tand\t\t\tthere\n\n\nnewlines\r\ncarriage\rreturns\n \n  \n",
    "\n",
    "\n\n\n",
    " \n \t \n",
    "    indented\n        twice\n",
    "no\u00a0break, thin\u2009space, ideographic\u3000space, zero\u200bwidth, line\u2028sep, nel\u0085",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f",
    "\ufeffbyte order mark, soft\u00adhyphen, replacement \ufffd, private \ue000, noncharacter \ufdd0",
    "!!! ... ??? --- === ### *** ``` ~~~ ((())) [[[]]] {{{}}} <<<>>>",
    "—–‐‑ “curly” ‘quotes’ „low“ ‚single‘ ‹angle› …",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "ĠĊ is how the vocabulary writes a space and a newline; Ġ",
    "a sentence that ends with half a word and a spa ce ",
)
"""Texts in which nothing is a special token."""

SPECIAL_TEXTS = (
    "<|im_end|>",
    "before<|im_end|>after",
    "two <|im_start|><|im_end|> in a row, <|endoftext|> at the end<|endoftext|>",
    "spaces around <|im_start|> it",
    "<repo_name>x<file_sep>y<filename>",
)
"""Texts with special tokens, which the golden ids have as control tokens; in a request they are plain text."""

SENTENCEPIECE_TEXTS = (
    "<s>",
    "</s> after, <s>before</s>, <unk> between",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST]x[/INST]",
    "<0x41><0x0A> is text, <0x is too",
    "\u2581 already \u2581 escaped\u2581",
    "<think>hm</think> x <think><think>a b  a b<think",
    "    four,     five,        eight",
    "\n  \n",
    "abababababab aaaaaaa ababa",
    "☠☠ ☠ \U0001f9ff\U0001f9ff unknown to all",
)
"""Texts in which something has a meaning of its own to SentencePiece, or looks as if it had."""

Conversation = list[dict[str, Any]]

CONVERSATIONS: dict[str, Conversation] = {
    "question": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "turns": [
        {"role": "user", "content": "Hi, I'm Zoë 🙂"},
        {"role": "assistant", "content": "Hello Zoë!\n\nHow can I help?"},
        {"role": "user", "content": "  Write 12345 in words,\tplease.  \n"},
        {"role": "assistant", "content": "twelve thousand\n"},
        {"role": "user", "content": "日本語で: 一二三"},
    ],
    "empty": [{"role": "user", "content": ""}],
    "code": [{"role": "user", "content": "```python\nif a < b and c > d:\n    print(f'{a|b}')\n```\n> quoted <"}],
    "answered": [
        {"role": "user", "content": "Count to three."},
        {"role": "assistant", "content": "one, two,  "},
    ],
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für einen Ort: <b>jetzt</b> & später",
            "parameters": {"type": "object", "properties": {"place": {"type": "string", "enum": ["Köln", "東京"]}}},
        },
    }
]

TOOL_CONVERSATION: Conversation = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "Weather in 東京?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"place": "東京"}}}],
    },
    {"role": "tool", "name": "get_weather", "content": '{"sky": "clear", "°C": 21}'},
    {"role": "assistant", "reasoning_content": " It is warm. ", "content": "<b>21 °C</b>"},
    {"role": "user", "content": "Thanks!"},
]

TOOL_TEMPLATE = """\
{%- set state = namespace(num_users=0, last='') %}
{%- macro section(name, body) -%}
<{{ name }}>{{ body | trim }}</{{ name }}>
{%- endmacro %}
{%- if tools %}
    {{- bos_token + 'system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' + (tool.function.parameters | tojson(indent=2)) }}
        {{- tool.function | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}
    {%- endfor %}
    {{- eos_token + '\\n' }}
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% elif message.role == 'user' %}
        {% set state.num_users = state.num_users + 1 %}
{{ bos_token }}{{ message.role | upper }} #{{ state.num_users }}
{{ message.content }}{{ eos_token }}
    {% elif message.tool_calls %}
{{ bos_token }}assistant
        {% for call in message.tool_calls %}
{{ section('call', call.function | tojson) }}
        {% endfor %}
        {% if message.content is not defined %}(nothing said){% endif %}
{{ eos_token }}
    {% elif message.role == 'tool' %}
{{ bos_token }}tool {{ message['name'] }}
{{ message.content[:40] }}{{ eos_token }}
    {% else %}
{{ bos_token }}assistant
        {% generation %}
            {% if message.reasoning_content is defined %}
{{ section('think', message.reasoning_content) }}
            {% endif %}
{{ message.content.split('</b>')[0].lstrip('<b>') }}{{ eos_token }}
        {% endgeneration %}
    {% endif %}
    {% for character in message.content or '' %}
        {% if loop.index > 3 %}{% break %}{% endif %}
{{ character }}{{ ',' if not loop.last }}
    {% endfor %}
{% endfor %}
{% if add_generation_prompt %}
{{ bos_token }}assistant
{% endif %}
"""
"""A template that uses what transformers adds to jinja2, and its whitespace rules."""

BEGINNINGS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "The three primary colors are",
    "def fibonacci(n):\n    ",
    "To make a cup of tea, first",
    "The largest planet in the solar system is",
    "Photosynthesis is the process by which",
    "In 1969, Neil Armstrong",
    "The opposite of hot is",
    "A list of the days of the week: Monday, Tuesday,",
    "Q: What is 7 times 8?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondria are known as",
    "import numpy as np\n\nx = np.",
    "Shakespeare wrote many plays, among them",
    "The recipe calls for two eggs, a cup of flour and",
    "Les rivières de France sont",
    "If it rains tomorrow, we will",
    "The meaning of the word 'entropy' is",
)
"""What a model is to go on with."""
