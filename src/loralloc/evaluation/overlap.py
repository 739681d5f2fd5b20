"""Generated text against all its references: BLEU, ROUGE-L and METEOR by kept libraries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from loralloc.evaluation.figure import Figure, check_pairs, mean_figure
from loralloc.evaluation.wordnet import WordNet, load_wordnet


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """Corpus BLEU against all references of each prediction (Post 2018, sacrebleu).

    Args:
        predictions: One text an example.
        references: The texts each is measured against, at least one an example; their number may
            differ.

    Raises:
        ValueError: An example has no reference, there are no predictions, or the two lengths
            differ.
    """
    from sacrebleu.metrics import BLEU

    check_pairs("BLEU", predictions, references)
    metric = BLEU()
    most = max(len(texts) for texts in references)
    # sacrebleu wants one list a reference number; None stands for "this example has fewer".
    streams = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    score = metric.corpus_score(list(predictions), streams)
    implementation = f"sacrebleu {metric.get_signature()}"
    return Figure(name="BLEU", value=score.score, implementation=implementation)


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """Sentence BLEU of sacrebleu: orders longer than the text are left out, zeros are smoothed.

    Corpus BLEU is not the mean of these.
    """
    from sacrebleu.metrics import BLEU

    return float(BLEU(effective_order=True).sentence_score(prediction, list(references)).score)


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """ROUGE-L (Lin 2004, rouge-score): the best F over the references, averaged over examples.

    With Porter's stemmer, as is usual for summaries and in GEM. The library knows words of ASCII
    letters and digits only: a text without any scores 0.

    Args:
        predictions: One text an example.
        references: As for `bleu`.

    Raises:
        ValueError: As `bleu`.
    """
    check_pairs("ROUGE-L", predictions, references)
    scores = [rouge_l_score(*pair) for pair in zip(predictions, references, strict=True)]
    implementation = f"rouge-score {version('rouge-score')}: F, stemmer, maximum over references"
    return mean_figure("ROUGE-L", scores, implementation)


def rouge_l_score(prediction: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L F of one prediction, against the reference nearest to it."""
    return 100.0 * float(_rouge_scorer().score_multi(references, prediction)["rougeL"].fmeasure)


def meteor(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    wordnet: WordNet | None = None,
) -> Figure:
    """METEOR as nltk has it (Lavie and Agarwal 2007): the best over references, averaged.

    It differs from the METEOR 1.5 of the E2E challenge, which has paraphrases, weights for
    function words and other parameters; and it looks up synonyms of the stems of words, so that
    a word whose stem is no word has none.

    Args:
        predictions: One text an example.
        references: As for `bleu`.
        wordnet: The synonyms; if None, those of this machine (`wordnet.find_wordnet`).

    Returns:
        The figure; without a value, and saying why, where this machine has no WordNet.

    Raises:
        ValueError: As `bleu`.
    """
    check_pairs("METEOR", predictions, references)
    library = f"nltk {version('nltk')}"
    try:
        synonyms = wordnet or load_wordnet()
    except FileNotFoundError as error:
        return Figure(name="METEOR", value=None, implementation=library, missing=str(error))
    scores = [
        meteor_score(prediction, texts, wordnet=synonyms)
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    implementation = f"{library}: WordNet {synonyms.version}, tok:13a, maximum over references"
    return mean_figure("METEOR", scores, implementation)


def meteor_score(prediction: str, references: Sequence[str], *, wordnet: WordNet) -> float:
    """Return the METEOR of one prediction, against the reference nearest to it.

    Tokens are those of BLEU (mteval's 13a): nltk's `word_tokenize` would need a model of sentence
    ends, which has to be downloaded.
    """
    from nltk.translate import meteor_score as nltk_meteor
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    tokens = [tokenize(text).split() for text in references]
    predicted = tokenize(prediction).split()
    return 100.0 * float(nltk_meteor.meteor_score(tokens, predicted, wordnet=wordnet))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
