"""Small tokenizers with the algorithms, special tokens and chat templates of real families, for the tests of texts.

A family's vocabulary is learnt from a few sentences; what matters here is how it cuts white space, which tokens it puts around
a text, and what its template does with roles, white space, thinking, dates and the end of a turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = (
    "The garden was quiet. Summarise the text, please; answer in one word. user assistant system model Instruction: Input: "
    "Response: No input. Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\nsay hello\nToday is 26 Jul 2024. think tool 1234567890 "
    '{"key": [true, null]} «é» ünïcode 😀 <|> [INST] [/INST] <<SYS>> :\n\n\n  two  spaces\tand a tab. '
)


class Family(NamedTuple):
    """A tokenizer of a family and what is known of it."""

    tokenizer: PreTrainedTokenizerBase
    end_of_turn: str | None = None
    """Token that ends the assistant's turn in its template."""
    folds_system: bool = False
    """Its template has no system turn."""
    own_prompt: bool = True
    """The template's generation prompt is the beginning of a stored row."""
    earlier_end: str | None = None
    """Token that ends earlier answers, where that is another one."""


_LINES = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen cut texts: line breaks stay together."""


def _byte_level(
    special: list[str], *, trims: bool = False, prefix: bool = False, around: str | None = None, lines: bool = True
) -> Tokenizer:
    """BPE over bytes, as Llama 3 and Qwen or (`lines` false) GPT-2; `around` is a TemplateProcessing such as "<s> $A"."""
    tokenizer = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Split(Regex(_LINES), "isolated")] if lines else []
    own = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not lines)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, own])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    steps: list[Any] = [processors.ByteLevel(add_prefix_space=prefix or trims, trim_offsets=trims)]
    if around is not None:
        steps.append(_around(tokenizer, around))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def _sentencepiece(special: list[str], *, prepends: bool = True, around: str | None = None) -> Tokenizer:
    """BPE over characters with byte fallback and "▁" for spaces, as Llama 2 (a "▁" before the text) and Gemma (none)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=special[0]))
    steps: list[Any] = [normalizers.Prepend("▁")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=▁)|(?=▁)"), "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", int(prepends), 0)]
    )
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *pieces], show_progress=False)
    )
    if around is not None:
        tokenizer.post_processor = _around(tokenizer, around)
    return tokenizer


def _around(tokenizer: Tokenizer, single: str) -> Any:
    tokens = [(name, tokenizer.token_to_id(name)) for name in single.split() if not name.startswith("$")]
    return processors.TemplateProcessing(single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=tokens)


def _fast(tokenizer: Tokenizer, template: str | None = None, **tokens: str) -> PreTrainedTokenizerBase:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    made.chat_template = template
    return made


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CHATML_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    + _CHATML
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message['content'] | tojson) + '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_LLAMA31 = (
    '{{ bos_token }}{%- set date_string = strftime_now("%d %b %Y") %}'
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ '<|eot_id|>' }}"
    + _LLAMA3.removeprefix("{{ bos_token }}").replace("in messages", "in rest")
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = (  # the system text goes into the last user turn, where that is the last message
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
_LAST_USER = (  # the system text goes into the last user turn, wherever that stands
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for message in rest %}{% if message['role'] == 'user' %}"
    "{% if system is defined and message == users[-1] %}{{ '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_QWEN3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% set content = message.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN3_THINKING = _QWEN3.removesuffix("{{ '<|im_start|>assistant\\n' }}{% endif %}") + (
    "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
_R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ '<|User|>' + message.content }}"
    "{% else %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
_HARMONY = (  # the last answer ends in another token than those before it
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PARTS = (  # content is a list of parts, as in templates of vision models
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_COMMAND = (
    "{{ bos_token }}{% for message in messages %}{% set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}"
    "[message['role']] %}{{ '<|START|><|' + name + '|>' + message['content'].strip() + '<|END_OF_TURN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}"
)

_END = "<|endoftext|>"
_IM = [_END, "<|im_start|>", "<|im_end|>"]
_HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def _llama3(template: str) -> PreTrainedTokenizerBase:
    tokenizer = _byte_level(_HEADERS, trims=True, around="<|begin_of_text|> $A")
    return _fast(tokenizer, template, bos_token=_HEADERS[0], eos_token=_HEADERS[1])


def _llama2(template: str | None, around: str = "<s> $A") -> PreTrainedTokenizerBase:
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"], around=around)
    return _fast(tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _qwen3_thinking() -> PreTrainedTokenizerBase:
    tokenizer = _byte_level(_IM)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<think>", "</think>")])
    return _fast(tokenizer, _QWEN3_THINKING, eos_token="<|im_end|>")


def _phi3() -> PreTrainedTokenizerBase:
    tokenizer = _sentencepiece(["<unk>", "<s>", _END])
    names = ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False, special=True) for name in names])
    return _fast(tokenizer, _PHI3, bos_token="<s>", eos_token=_END, unk_token="<unk>")


_MADE: dict[str, Callable[[], Family]] = {
    "gpt2": lambda: Family(_fast(_byte_level([_END], lines=False), bos_token=_END, eos_token=_END, unk_token=_END), _END),
    "neox": lambda: Family(
        _fast(_byte_level([_END, "<|padding|>"], lines=False), eos_token=_END, pad_token="<|padding|>"), _END
    ),
    "trimmed offsets": lambda: Family(_fast(_byte_level([_END], trims=True, prefix=True, lines=False), eos_token=_END), _END),
    "llama2 base": lambda: Family(_llama2(None), "</s>"),
    "llama2 with eos": lambda: Family(_llama2(None, "<s> $A </s>"), "</s>"),
    "llama2 chat": lambda: Family(_llama2(_LLAMA2), "</s>"),
    "mistral": lambda: Family(_llama2(_MISTRAL), "</s>", folds_system=True),
    "last user turn": lambda: Family(_llama2(_LAST_USER), "</s>"),
    "zephyr": lambda: Family(_llama2(_ZEPHYR), "</s>"),
    "llama3": lambda: Family(_llama3(_LLAMA3), "<|eot_id|>"),
    "llama3.1": lambda: Family(_llama3(_LLAMA31), "<|eot_id|>"),
    "gemma": lambda: Family(
        _fast(
            _sentencepiece(["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], prepends=False, around="<bos> $A"),
            _GEMMA,
            bos_token="<bos>",
            eos_token="<eos>",
        ),
        "<end_of_turn>",
        folds_system=True,
    ),
    "chatml base": lambda: Family(_fast(_byte_level(_IM), _CHATML, bos_token=_END, eos_token=_END), "<|im_end|>"),
    "smollm2": lambda: Family(
        _fast(_byte_level(_IM), _CHATML_DEFAULT, bos_token="<|im_start|>", eos_token="<|im_end|>"), "<|im_end|>"
    ),
    "qwen3": lambda: Family(_fast(_byte_level(_IM), _QWEN3, eos_token="<|im_end|>"), "<|im_end|>", own_prompt=False),
    "qwen3 thinking": lambda: Family(_qwen3_thinking(), "<|im_end|>", own_prompt=False),
    "deepseek-r1": lambda: Family(
        _fast(
            _byte_level(["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"], around="<|bos|> $A"),
            _R1,
            bos_token="<|bos|>",
            eos_token="<|eos|>",
        ),
        "<|eos|>",
        own_prompt=False,
    ),
    "gpt-oss": lambda: Family(
        _fast(
            _byte_level([_END, "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]),
            _HARMONY,
            bos_token=_END,
            eos_token="<|return|>",
        ),
        "<|return|>",
        own_prompt=False,
        earlier_end="<|end|>",
    ),
    "phi3": lambda: Family(_phi3(), "<|end|>"),
    "content parts": lambda: Family(
        _fast(_byte_level([_END, "<|im_start|>", "<end_of_utterance>"]), _PARTS, eos_token=_END), "<end_of_utterance>"
    ),
    "command-r": lambda: Family(
        _fast(
            _byte_level(
                ["<BOS>", "<EOS>", "<|START|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>", "<|END_OF_TURN|>"], around="<BOS> $A"
            ),
            _COMMAND,
            bos_token="<BOS>",
            eos_token="<EOS>",
        ),
        "<|END_OF_TURN|>",
    ),
}
FAMILIES = tuple(_MADE)
"""Names of the families."""


@lru_cache
def family(name: str) -> Family:
    """Make the tokenizer of a family."""
    return _MADE[name]()
