"""Scores of answers against references, by well-kept libraries.

Every metric takes one answer and one or several references a prompt, at least one prompt, and
gives one number, larger is better. `loss` is not here: it needs the model, not its answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from lorakit.errors import InputError, did_you_mean

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA = "\u3040-\u30ff"
_HANGUL = "\uac00-\ud7a3"
# Scripts without spaces give one word a character, all others the runs between punctuation.
_WORDS = re.compile(f"[{_HAN}{_KANA}]|[^\\W_{_HAN}{_KANA}]+")


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers equal to one of their references, white space at the ends aside."""
    return fmean(
        answer.strip() in {reference.strip() for reference in own}
        for answer, own in zip(answers, references, strict=True)
    )


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU from 0 to 100 (sacrebleu), each prompt with its own number of references.

    Mostly Chinese references are tokenised with sacrebleu's `zh`, mostly Japanese or Korean ones
    by character, since its tokenisers for these need a dictionary that is installed apart.
    """
    import sacrebleu

    most = max(len(own) for own in references)
    # sacrebleu wants one list for each place among the references; None says that there is none.
    places = [[own[i] if i < len(own) else None for own in references] for i in range(most)]
    tokenize = _bleu_tokenizer("".join(text for own in references for text in own))
    score = sacrebleu.corpus_bleu(
        list(answers),
        places,  # type: ignore[arg-type]
        tokenize=tokenize,
    )
    return min(score.score, 100.0)  # rounding can leave it just above


def rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean ROUGE-L F-measure from 0 to 1 (rouge-score), each answer by its best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return fmean(
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in own)
        for answer, own in zip(answers, references, strict=True)
    )


METRICS: dict[str, Metric] = {"exact_match": exact_match, "bleu": bleu, "rouge": rouge}


_OF_TRL = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}


def score_name(name: str) -> str:
    """A score's name without Trainer's `eval_`; TRL's names of rewards become the ones here."""
    plain = name.removeprefix("eval_")
    return _OF_TRL.get(plain, plain)


def parse_metrics(text: str, known: Iterable[str] = (*METRICS, "loss")) -> list[str]:
    """The names in `"exact_match, loss"`, each once; arguments and errors as in `check_metrics`."""
    names = list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    check_metrics(names, known)
    return names


def check_metrics(names: Sequence[str], known: Iterable[str] = (*METRICS, "loss")) -> None:
    """Raises InputError where a name is none of the `known` metrics, or there is no name."""
    known = list(known)
    if not names:
        raise InputError(f"no metric is named; there are {', '.join(known)}")
    for name in names:
        if name not in known:
            raise InputError(
                f"'{name}' is not a metric{did_you_mean(name, known)}; there are {', '.join(known)}"
            )


class _Words:
    """Words of every script; rouge-score's own tokenizer drops all that is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words without punctuation."""
        return _WORDS.findall(text.lower())


def _bleu_tokenizer(text: str) -> str:
    characters = len(re.sub(r"\s", "", text))
    others = len(re.findall(f"[{_KANA}{_HANGUL}]", text))
    han = len(re.findall(f"[{_HAN}]", text))
    if 2 * (han + others) <= characters:
        return "13a"
    return "char" if others else "zh"
