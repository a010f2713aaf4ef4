"""How good a checkpoint's answers to dev questions about known facts are: what checkpoints are chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np

from align.evaluation.benchmarks import air_bench
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.comparison import levels
from align.evaluation.judges.facts import FactJudge
from align.generation.engine import Decoding, Request
from align.generation.transformers_engine import TransformersEngine
from align.models.chat import assistant, user
from align.models.features import ClipFeatures
from align.models.qwen2_audio import model as qwen2_audio
from align.models.scoring import kl_per_completion
from align.training.collate import SFTCollator

_BATCH = 128
"""Dev questions that are answered together."""


class DevScore:
    """Scores a policy by its answers to dev questions about known facts, and by its KL to the reference."""

    def __init__(
        self,
        reference: Path | str,
        corpus: Path,
        questions: int,
        max_new_tokens: int,
        run: Path | None = None,
    ) -> None:
        """`questions` of the corpus' dev split, answered in up to `max_new_tokens` tokens.

        What the policies' audio towers give is kept in the folder of a `run`.
        """
        self.decoding, self.corpus, self.run = Decoding(max_new_tokens), corpus, run
        self._questions, self._reference = questions, reference

    @cached_property
    def items(self) -> list[Item]:
        """Read when the first checkpoint is scored."""
        return _dev_items(self.corpus, self._questions, self.reference.clips.longest_s)

    @cached_property
    def requests(self) -> list[Request]:
        """A request for each item."""
        return [Request(item.question, (f"dev/{item.audio}",)) for item in self.items]

    @cached_property
    def reference(self) -> TransformersEngine:
        """Loaded when training is over."""
        processor = qwen2_audio.load_processor(self._reference)
        return TransformersEngine(self._reference, ClipFeatures(processor, self.corpus), self.run)

    def __call__(self, policy: Path) -> dict[str, float]:
        """Means over the questions; KL in nats per answer."""
        engine = TransformersEngine(policy, self.reference.clips, self.run)
        answers = self._answers(engine)
        judged = FactJudge(self.corpus / "phrasebook.yaml").judge(self.items, answers)
        overall = levels(judged) | {"score": fmean(answer.score or 0.0 for answer in judged)}
        names = ("factuality", "behaviour", "score", "fact_accuracy", "over_abstention", "words")
        kl = self._kl(engine, answers)
        engine.close()
        return {**{f"dev/{name}": overall[name] for name in names if name in overall}, "dev/kl": kl}

    def _answers(self, engine: TransformersEngine) -> list[str]:
        numbered = list(enumerate(self.requests))
        batches = (dict(numbered[i : i + _BATCH]) for i in range(0, len(numbered), _BATCH))
        completed = (done for batch in batches for done in engine.complete(batch, self.decoding, seed=0))
        return [completions[0].text for _, completions in sorted(completed)]

    def _kl(self, engine: TransformersEngine, answers: Sequence[str]) -> float:
        rows = [
            {"messages": [user(item.question, 1), assistant(answer)], "audios": request.audios}
            for item, request, answer in zip(self.items, self.requests, answers, strict=True)
        ]
        ours, theirs = engine.tower_outputs, self.reference.tower_outputs
        is_same_tower = ours is not None and theirs is not None and ours.folder == theirs.folder
        tower_outputs = ours if is_same_tower else None  # both models read the same batches
        collate = SFTCollator(engine.processor, engine.clips, packed=True, tower_outputs=tower_outputs)
        return float(kl_per_completion(engine.model, self.reference.model, collate, rows).mean())


def _dev_items(corpus: Path, n: int, longest_s: float) -> list[Item]:
    """`n` dev questions, the same for every policy, but for those about clips that cannot be read."""
    items = air_bench.read(corpus / "dev")
    drawn = np.random.default_rng(0).permutation(len(items))[:n]
    return air_bench.audit(corpus / "dev", [items[i] for i in sorted(drawn)], longest_s).usable
