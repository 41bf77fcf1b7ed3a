"""How good what a language model wrote is: exact match, word F1, ROUGE-L, substrings.

Where the rule of LLM-Embedder's evaluations is not the usual one both are here, and only theirs is
comparable with their leaderboard.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"[a-z0-9]+")


def exact_match(output: str, answers: Sequence[str], *, articles: bool) -> float:
    """1 when the output is one of the answers but for case, ASCII punctuation and blanks.

    Args:
        articles: whether a, an and the count: they do in LLM-Embedder's NQ (`eval_qa.py`), not in
            SQuAD's rule (`evaluate-v1.1.py`).
    """
    return float(_plain(output, articles) in {_plain(answer, articles) for answer in answers})


def word_f1(output: str, answers: Sequence[str]) -> float:
    """The best F1 of the output's words and an answer's, each as often as it occurs, by SQuAD's
    normalisation (`evaluate-v1.1.py`)."""
    return max((_f1(output, answer) for answer in answers), default=0.0)


def _f1(output: str, answer: str) -> float:
    found, wanted = (Counter(_plain(text, False).split()) for text in (output, answer))
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def _plain(text: str, articles: bool) -> str:
    text = text.lower().translate(_PUNCTUATION)
    return " ".join((text if articles else _ARTICLES.sub(" ", text)).split())


def contains(output: str, answers: Sequence[str]) -> float:
    """1 when an answer is in the output as it is, in lower case or with only its first letter a
    capital: PopQA's rule, by which short answers are found in longer words."""
    forms = {form for a in answers for form in (a, a.lower(), a.capitalize())}
    return float(any(form in output for form in forms))


def contains_words(output: str, answers: Sequence[str]) -> float:
    """1 when an answer is in the output as whole words, in any case."""
    return float(
        any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", output, re.IGNORECASE) for a in answers)
    )


def rouge_l(output: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L of one text), words being
    runs of letters and digits in lower case, as in Google's rouge-score without a stemmer."""
    found, wanted = (_WORD.findall(text.lower()) for text in (output, reference))
    common = len(_common(found, wanted))
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def rouge_l_of_sets(output: str, reference: str) -> float:
    """ROUGE-L as the package `rouge` has it, given lines as LLM-Embedder does.

    Texts are split into sentences at full stops, sentences into words at blanks. F1 of sets: of
    all words in a longest common subsequence of some pair of sentences, and of all words. Case and
    punctuation count, repetition and the order of sentences do not; after a last full stop there is
    one more sentence, of one empty word.
    """
    found, wanted = (_sentences(text) for text in (output, reference))
    common = {word for f in found for w in wanted for word in _common(w, f)}
    words = [{word for sentence in text for word in sentence} for text in (found, wanted)]
    # 1e-8 is the package's.
    precision, recall = (len(common) / max(len(part), 1) for part in words)
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    parts = (text + "\n").split(".")
    return [" ".join(part.split()).split(" ") for part in parts if part]


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            before = lengths[i - 1][j], lengths[i][j - 1]
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if x == y else max(before)
    out, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            out.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return out[::-1]
