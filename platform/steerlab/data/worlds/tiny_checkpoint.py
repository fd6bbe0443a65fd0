"""Write the untrained language model of the tiny world: a Llama of about a million parameters, with one token per word."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from steerlab.data.worlds.tiny_words import SPECIAL_TOKENS, VOCABULARY
from steerlab.guards.json_values import JsonObject

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<bos><ins> {{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<dat> {{ message['content'] }}"
    "{% else %}<res> {{ message['content'] }}<eos>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<res>{% endif %}"
)

MODEL_CONFIG: JsonObject = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_cache": True,
    "dtype": "float32",
}


def write_model(directory: Path) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json; weights are not written, since training starts from a
    seed."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    # The text is split at spaces and punctuation, so that every word of the vocabulary is one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    # A plain text begins with <bos>, as in Llama's tokenizer.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        **MODEL_CONFIG,
        "vocab_size": len(VOCABULARY),
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
    }
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **special,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
