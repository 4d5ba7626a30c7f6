"""Scores of answers against references, by well-kept libraries.

Every metric takes one answer and one or several references a prompt, and gives one number,
larger is better. `loss` is not here: it needs the model, not its answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lorakit.errors import InputError, did_you_mean

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

_CJK = re.compile("[぀-ヿ㐀-䶿一-鿿가-힯]")


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of answers equal to one of their references, white space at the ends aside."""
    hits = [
        any(a.strip() == r.strip() for r in rs) for a, rs in zip(answers, references, strict=True)
    ]
    return sum(hits) / len(hits)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in 0 to 100 (sacrebleu), with every prompt's own number of references.

    Mostly Chinese, Japanese or Korean references are tokenised by character (`zh`).
    """
    import sacrebleu

    most = max(len(rs) for rs in references)
    # sacrebleu wants one stream a reference position; None stands for "no such reference".
    streams: list[Any] = [
        [rs[i] if i < len(rs) else None for rs in references] for i in range(most)
    ]
    tokenize = "zh" if _mostly_cjk(references) else "13a"
    return sacrebleu.corpus_bleu(list(answers), streams, tokenize=tokenize).score


def rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean ROUGE-L F-measure in 0 to 1 (rouge-score), each answer's best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [
        max(scorer.score(r, a)["rougeL"].fmeasure for r in rs)
        for a, rs in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores)


METRICS: dict[str, Metric] = {"exact_match": exact_match, "bleu": bleu, "rouge": rouge}


def parse_metrics(text: str) -> list[str]:
    """`"exact_match, loss"` to names, each once.

    Raises:
        InputError: a name is not a metric.
    """
    known = [*METRICS, "loss"]
    names = list(dict.fromkeys(n for n in (part.strip() for part in text.split(",")) if n))
    for name in names:
        if name not in known:
            raise InputError(
                f"'{name}' is not a metric{did_you_mean(name, known)}: there are {', '.join(known)}"
            )
    if not names:
        raise InputError(f"no metric is named: there are {', '.join(known)}")
    return names


class _Words:
    """rouge-score's own tokenizer drops all but ASCII; this keeps words of every script."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words, and single characters of scripts that are written without spaces."""
        return re.findall(r"[぀-ヿ㐀-䶿一-鿿가-힯]|[^\W_぀-ヿ㐀-䶿一-鿿가-힯]+", text.lower())


def _mostly_cjk(references: Sequence[Sequence[str]]) -> bool:
    text = "".join(r for rs in references for r in rs)
    return 2 * len(_CJK.findall(text)) > len(re.sub(r"\s", "", text))
