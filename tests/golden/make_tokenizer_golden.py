"""Make tokenizer_smollm2.json with Hugging Face transformers: `python -m tests.golden.make_tokenizer_golden GGUF`.

Vocabulary, merges and special tokens are read by transformers from the GGUF file. Its GGUF route gives every byte-level
tokenizer GPT-2's pre-tokenizer; SmolLM2's published tokenizer.json splits digits before that, so this takes its place.
Nothing of `engine` is imported: the reference must not share our mistakes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from tests.golden.texts import CONVERSATIONS, SPECIAL_TEXTS, TEXTS, TOOL_CONVERSATION, TOOL_TEMPLATE, TOOLS

OUTPUT = Path(__file__).with_name("tokenizer_smollm2.json")


def load(path: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digits_first = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = digits_first
    return tokenizer


def main() -> None:
    tokenizer = load(Path(sys.argv[1]))

    def chat(name: str, **arguments: Any) -> dict[str, Any]:
        """One rendering: which conversation, how, the text and its ids."""
        messages = TOOL_CONVERSATION if name == "tools" else CONVERSATIONS[name]
        template = {"chat_template": TOOL_TEMPLATE, "tools": TOOLS} if name == "tools" else {}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **template, **arguments)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **template, **arguments)
        return {"conversation": name, "arguments": arguments, "text": text, "ids": ids}

    open_end = {"add_generation_prompt": False, "continue_final_message": True}
    golden = {
        "made_with": f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
        "texts": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        "special_texts": [tokenizer(text, add_special_tokens=False).input_ids for text in SPECIAL_TEXTS],
        "chats": [
            *(chat(name, add_generation_prompt=True) for name in [*CONVERSATIONS, "tools"]),
            *(chat(name, add_generation_prompt=False) for name in [*CONVERSATIONS, "tools"]),
            *(chat(name, **open_end) for name in ("answered", "turns", "tools")),
        ],
    }
    OUTPUT.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{len(TEXTS)} texts, {len(golden['chats'])} chats, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
