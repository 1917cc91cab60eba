"""BERT and its kin (RoBERTa, XLM-RoBERTa): sentence embeddings as MiniLM, bge and e5, and cross-encoders that score.

Sources: transformers' BertModel, RobertaModel, XLMRobertaModel and their ForSequenceClassification, and the modules of
sentence-transformers for what becomes of the rows. The families differ in names, and RoBERTa's positions begin after
its padding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from engine.errors import UnsupportedModelError
from engine.models.blueprint import Blueprint, Description, Modules
from engine.models.keys import Keys, shown
from engine.models.recipe import Part, Recipe
from engine.models.spec import EncoderSpec

logger = logging.getLogger(__name__)

_DEFAULTS: Mapping[str, object] = {
    # What transformers takes where a config.json says nothing.
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # Keys that change the arithmetic, with the values under which they change nothing.
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
}

_ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

_LAYER: Mapping[str, tuple[str, ...]] = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "o": ("attention.output.dense",),
    "attn_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
"""Our tensors, without their biases, as modules of a layer."""

_TRAINING = ("cls.", "lm_head.")
"""What a checkpoint that was trained to fill in words has beside its encoder."""

_TENSORS_PER_LAYER = 16


def from_bert_config(description: Description) -> Blueprint[EncoderSpec]:
    """See `registry.Reader`."""
    return _from_config(description, "bert", first_position=0)


def from_roberta_config(description: Description) -> Blueprint[EncoderSpec]:
    """See `registry.Reader`."""
    return _from_config(description, "roberta", first_position=_first_position(description))


def from_xlm_roberta_config(description: Description) -> Blueprint[EncoderSpec]:
    """See `registry.Reader`."""
    return _from_config(description, "xlm-roberta", first_position=_first_position(description))


def _first_position(description: Description) -> int:
    """The row of a text's first token: positions are counted on from the padding's id."""
    return 1 + Keys(description.config).count("pad_token_id", 1, most=1 << 20)


def _from_config(description: Description, family: str, *, first_position: int) -> Blueprint[EncoderSpec]:
    keys = Keys({**_DEFAULTS, **description.config})
    for key, allowed in _NEUTRAL.items():
        keys.neutral(key, *allowed)
    shapes = description.shapes
    prefix = _prefix(shapes)
    classifier = _classifier(prefix, shapes)
    activation = keys.text("hidden_act")
    if activation not in _ACTIVATIONS:
        raise keys.error("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    num_rows = keys.count("max_position_embeddings", least=first_position + 1)
    max_position = num_rows - first_position
    modules = description.modules()
    if modules is None:
        modules = Modules("mean", normalize=False)
        if not classifier:
            logger.info("%s: nothing says how rows become an embedding: their mean is taken, not normalized", family)
    if modules.max_length is not None:
        max_position = min(max_position, modules.max_length)
    spec = EncoderSpec(
        family=family,
        num_layers=_num_layers(keys, shapes),
        hidden_size=keys.count("hidden_size"),
        num_heads=keys.count("num_attention_heads"),
        intermediate_size=keys.count("intermediate_size"),
        vocab_size=keys.count("vocab_size"),
        max_position=max_position,
        norm_eps=keys.positive("layer_norm_eps"),
        num_types=keys.count("type_vocab_size"),
        activation=_ACTIVATIONS[activation],
        pooling=modules.pooling,
        normalize=modules.normalize,
        num_labels=shapes[classifier["classifier"] + ".weight"][0] if classifier else 0,
    )
    recipes = _recipes(spec, prefix, classifier, num_rows=num_rows, first_position=first_position, shapes=shapes)
    used = {part.tensor for recipe in recipes for part in recipe.parts}
    ignored = {
        name
        for name in shapes
        if name not in used
        and (
            name in (prefix + "embeddings.position_ids", prefix + "embeddings.token_type_ids")
            or name.startswith((prefix + "pooler.", *_TRAINING))
        )
    }
    return Blueprint(spec, recipes, frozenset(ignored))


def _prefix(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What the names of the encoder's own tensors begin with, where it is part of a larger model."""
    for prefix in ("", "bert.", "roberta."):
        if prefix + "embeddings.word_embeddings.weight" in shapes:
            return prefix
    raise UnsupportedModelError("tensor embeddings.word_embeddings.weight is missing.")


def _classifier(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, str]:
    """The modules of a sequence classifier by our names; empty where there is none."""
    if "classifier.out_proj.weight" in shapes:  # RoBERTa
        return {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}
    shape = shapes.get("classifier.weight")
    if shape is None:
        return {}
    if len(shape) != 2 or prefix + "pooler.dense.weight" not in shapes:
        raise UnsupportedModelError(f"classifier.weight {shown(list(shape))} must be a matrix after a pooler.")
    return {"pooler": prefix + "pooler.dense", "classifier": "classifier"}


def _num_layers(keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of layers, which cannot be more than there are tensors for: a table is made of that length."""
    return keys.count("num_hidden_layers", least=1, most=max(1, len(shapes) // _TENSORS_PER_LAYER))


def _recipes(
    spec: EncoderSpec,
    prefix: str,
    classifier: Mapping[str, str],
    *,
    num_rows: int,
    first_position: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Recipe, ...]:
    wanted = spec.tensor_shapes()

    def affine(name: str, *modules: str) -> list[Recipe]:
        """A module's weights, and its bias."""
        shape = wanted[name]
        size = (shape[0] // len(modules), *shape[1:])
        ends = ("weight", "bias")
        if modules[0] + ".gamma" in shapes:  # as they were called before PyTorch had them
            ends = ("gamma", "beta")
        return [
            Recipe(name, tuple(Part(f"{module}.{ends[0]}", size) for module in modules)),
            Recipe(f"{name}_bias", tuple(Part(f"{module}.{ends[1]}", size[:1]) for module in modules)),
        ]

    embeddings, hidden = prefix + "embeddings.", spec.hidden_size
    positions = Part(
        embeddings + "position_embeddings.weight",
        wanted["positions"],
        first_row=first_position,
        stored=(num_rows, hidden),
    )
    recipes = [
        Recipe("embed", (Part(embeddings + "word_embeddings.weight", wanted["embed"]),)),
        Recipe("positions", (positions,)),
        Recipe("types", (Part(embeddings + "token_type_embeddings.weight", wanted["types"]),)),
        *affine("embed_norm", embeddings + "LayerNorm"),
    ]
    for i in range(spec.num_layers):
        for name, modules in _LAYER.items():
            layer = f"{prefix}encoder.layer.{i}."
            recipes += affine(f"layers.{i}.{name}", *(layer + module for module in modules))
    for name, module in classifier.items():
        recipes += affine(name, module)
    by_name = {recipe.name: recipe for recipe in recipes}
    return tuple(by_name[name] for name in wanted)
