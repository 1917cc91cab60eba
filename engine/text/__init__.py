"""Text to token ids and back: tokenizer, chat template, incremental detokenizer."""

from engine.text.chat_template import ChatTemplate, RenderedPrompt
from engine.text.detokenizer import Detokenizer
from engine.text.encoder_text import EncoderText
from engine.text.model_text import ModelText
from engine.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "EncoderText", "ModelText", "RenderedPrompt", "Tokenizer"]
