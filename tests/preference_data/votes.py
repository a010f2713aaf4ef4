"""Judgements for tests, by hand: who says what of which texts."""

from preference_data.preferences.rules import Rules, count
from preference_data.schema import Judgement, Prompt, Ranking

PROMPT = Prompt(
    id="p", audios=("a.wav",), question="What?", answer_gt="A.", meta_info="{}", task_name="speech_QA"
)
CHOICES = {
    "a": Ranking(ranks=(1, 2)),
    "b": Ranking(ranks=(2, 1)),
    "tie": Ranking(ranks=(1, 1)),
    "both_bad": Ranking(ranks=(1, 1), all_bad=True),
}
"""A choice between two, as the ranking that it is."""


def ranking(said):
    """Of a choice, of ranks ("1223", with ! where all are bad), or as it is."""
    if said is None or isinstance(said, Ranking):
        return said
    return CHOICES.get(said) or Ranking(ranks=tuple(map(int, said.rstrip("!"))), all_bad=said.endswith("!"))


def judged(texts, factuality, behaviour=None, annotator="r1", **more):
    """A judgement of texts; on behaviour a tie unless said."""
    texts = tuple(texts)
    said = {"factuality": ranking(factuality), "behaviour": ranking(behaviour)}
    if behaviour is None and factuality is not None:
        said["behaviour"] = Ranking(ranks=(1,) * len(texts))
    fields = {
        "comparison": "-".join(texts),
        "prompt_id": "p",
        "completions": tuple(f"id of {text}" for text in texts),
        "texts": texts,
        "kind": "rating" if factuality is None else "choice" if len(texts) == 2 else "ranking",
        "annotator": annotator,
        "annotator_kind": "person",
        "heard": 1.0,
        **said,
        **more,
    }
    fields["expected"] = ranking(fields.get("expected"))
    purpose = fields.get("purpose", "comparison")
    return Judgement(**{"id": f"{fields['comparison']} {annotator} {purpose}", **fields})


def counted(judgements, min_heard=0.8, **rules):
    """Those that count."""
    return count(judgements, Rules(min_heard=min_heard, **rules))
