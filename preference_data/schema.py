"""The records that flow through the pipeline. Frozen, validated on construction, addressed by id.

clip -> (prompt -> completion) -> comparison -> judgement -> preference pair, label. Records refer to audio
by a path relative to their corpus folder; they never contain it. Times are seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, model_validator

Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Facts = dict[str, str | list[str]]
"""True statements about a clip: slot -> value, e.g. {"word": "seven", "gender": "woman"}."""

Split = Literal["train", "preference", "dev", "test"]
Axis = Literal["factuality", "behaviour"]
AXES: tuple[Axis, ...] = ("factuality", "behaviour")
"""What annotators are asked about."""
PairAxis = Literal["factuality", "behaviour", "reward"]
"""On what a chosen completion is better: one of `AXES`, or a reward."""
MOST_COMPARED = 4
"""Completions in a comparison, at most: as many as a person keeps in mind after one listen."""
LETTERS = "ABCD"
"""What annotators call the completions of a comparison, in the order in which they see them."""
AnnotatorKind = Literal["person", "model", "simulated"]
JudgementKind = Literal["choice", "ranking", "rating"]
"""How a judgement was given: which of two is better, an order of several, or each completion on its own."""
ErrorType = Literal[
    "omission", "invented_event", "wrong_order", "wrong_count", "wrong_words", "wrong_speaker"
]
Role = Literal["system", "user", "assistant"]
Purpose = Literal["comparison", "retest", "gold", "adjudication", "correction"]
"""Why annotators get a comparison: to learn a preference, or to measure the annotator (`retest`: the same
comparison again in another order; `gold`: its right order is known); or because annotators disagree
(`adjudication`), or one of its completions was typed by an annotator (`correction`)."""
SelectedBy = Literal["random", "active"]
"""Why a comparison is among those to ask about: drawn by lot, or by a rule of `preferences.selection`."""


class Record(BaseModel):
    """Base of all records: immutable, and an unknown or missing field is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Id


class AudioClip(Record):
    """One audio file and what is known about it."""

    path: str
    split: Split
    duration_s: float = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    speaker: str | None = None
    facts: Facts = {}
    source: str = "synthetic"
    """Where it came from within its corpus: results are also reported per source."""
    licence: str | None = Field(None, exclude_if=lambda licence: licence is None)
    """As its publisher names it; None where only the corpus has one, or it is not known."""


class Turn(BaseModel):
    """A question and its answer within a chat; `defect` names what is wrong with the answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    """Empty where the clips hold the question: voice chat."""
    answer: str
    defect: str | None = None
    audios: tuple[str, ...] = ()
    """Clips that this turn brings, as its record's `audios` has them."""


def _clips_per_turn(turns: Sequence[Turn], audios: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The clips that each turn brings, and last those of `audios` that none does.

    Raises:
        ValueError: the turns bring others, or in another order.
    """
    brought = tuple(path for turn in turns for path in turn.audios)
    if audios[: len(brought)] != brought:
        raise ValueError(f"audios {audios} are not those of the turns in order: {list(brought)}")
    return (*(turn.audios for turn in turns), audios[len(brought) :])


def _questions(history: Iterable[Turn], question: str) -> list[str]:
    return [*(turn.question for turn in history), question]


def _refuse_empty_turns(questions: Iterable[str], clips: Iterable[Sequence[str]]) -> None:
    for number, (question, own) in enumerate(zip(questions, clips, strict=True), 1):
        if not question.strip() and not own:
            raise ValueError(f"turn {number} has neither a question nor a clip")


class Chat(Record):
    """A multi-turn chat about any number of clips; every answer is a training target.

    Voice chat (spoken questions), audio analysis (written ones about clips) and plain text need no mark of
    their own (Qwen2-Audio, arXiv:2407.10759, section 2: no system prompt switches modes).
    """

    system: str | None = None
    """The system prompt; None: the model's own."""
    audios: tuple[str, ...]
    """All clips in order of appearance. Where no turn says which are its own, all come with the first."""
    turns: tuple[Turn, ...] = Field(min_length=1)

    @property
    def audios_per_turn(self) -> tuple[tuple[str, ...], ...]:
        """The clips that each turn brings."""
        *brought, left = _clips_per_turn(self.turns, self.audios)
        return tuple(brought) if any(brought) else (left, *brought[1:])

    @model_validator(mode="after")
    def _turns_ask_and_clips_add_up(self) -> Chat:
        brought = [path for own in self.audios_per_turn for path in own]
        if tuple(brought) != self.audios:
            raise ValueError(f"audios {self.audios} are not those of the turns in order: {brought}")
        _refuse_empty_turns((turn.question for turn in self.turns), self.audios_per_turn)
        return self


class Word(BaseModel):
    """A spoken word and when it was spoken, in seconds from the start of the clip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    start_s: float = Field(ge=0)
    end_s: float = Field(ge=0)


class TaskExample(Record):
    """A pre-training example: clips, a task, and the text that is right for them.

    How task, languages and question are put to the model is `prompts`' business, in either prompt format
    (Qwen-Audio, arXiv:2311.07919, section 2.2; Qwen2-Audio, arXiv:2407.10759, section 2).
    """

    audios: tuple[str, ...]
    task: str
    """A key of `tasks.TASKS`, e.g. "transcribe"."""
    text: str
    audio_language: str | None = None
    """ISO 639-1 (yue: 639-3) of the speech, where the task does not say; None: as the task has it."""
    text_language: str | None = None
    """Language of the text, likewise."""
    question: str | None = None
    """Where the task answers a question."""
    words: tuple[Word, ...] = ()
    """The words of `text` in order, where the task has word-level time stamps."""


class Prompt(Record):
    """A question about clips, put to a policy, with what was said before it.

    `meta_info` is what a judge may know of the clips.
    """

    system: str | None = Field(None, exclude_if=lambda system: system is None)
    """The system prompt; None: the model's own."""
    audios: tuple[str, ...]
    """All clips in order of appearance; those that no earlier turn brings come with the question."""
    history: tuple[Turn, ...] = Field((), exclude_if=lambda history: not history)
    """Earlier questions and their answers, the oldest first."""
    question: str
    """The last question. Empty where its clips hold it: voice chat."""
    answer_gt: str
    """A reference answer; stabilises judging, never shown to the policy."""
    meta_info: str
    task_name: str
    choices: tuple[str, ...] = ()
    """Of a multiple-choice question, which lists them too: their texts in order, `answer_gt` among them."""

    @property
    def audios_per_turn(self) -> tuple[tuple[str, ...], ...]:
        """The clips that each question brings, the last one's included."""
        return _clips_per_turn(self.history, self.audios)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that a policy answers."""
        return conversation(self.question, self.audios, self.system, self.history)

    @model_validator(mode="after")
    def _turns_ask_and_clips_add_up(self) -> Prompt:
        _refuse_empty_turns(_questions(self.history, self.question), self.audios_per_turn)
        return self


class Completion(Record):
    """A policy's answer to a prompt. `index` counts the samples of the prompt from 0."""

    prompt_id: Id
    index: int = Field(ge=0)
    text: str
    policy: str
    """sha256 of the weights that produced it."""
    logp: float | None = Field(None, allow_inf_nan=False, exclude_if=lambda logp: logp is None)
    """Log-probability of its tokens, summed, in nats, under the policy that drew it, before temperature and
    top-p; None where it is not known. Its last digits depend on what else was in the batch."""
    n_tokens: int | None = Field(None, ge=1, exclude_if=lambda n_tokens: n_tokens is None)
    """How many tokens those are, with the end of turn."""

    @property
    def mean_logp(self) -> float | None:
        """Log-probability per token, in nats; None where it is not known."""
        return None if self.logp is None or self.n_tokens is None else self.logp / self.n_tokens


class Ranking(BaseModel):
    """Completions in order on one axis, as they were shown: 1 is best, equal numbers are a tie.

    `all_bad`: none is acceptable, whatever their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: tuple[int, ...] = Field(min_length=1, max_length=MOST_COMPARED)
    all_bad: bool = False

    @classmethod
    def dense(cls, ranks: Sequence[int], *, all_bad: bool = False) -> Ranking:
        """Ranks in the same order without gaps: of 1, 1, 3 as sports count them, 1, 1, 2."""
        values = sorted(set(ranks))
        return cls(ranks=tuple(1 + values.index(rank) for rank in ranks), all_bad=all_bad)

    @model_validator(mode="after")
    def _ranks_have_no_gaps(self) -> Ranking:
        if set(self.ranks) != set(range(1, max(self.ranks) + 1)):
            raise ValueError(f"ranks {self.ranks} do not count from 1 without a gap")
        return self

    def prefers(self, first: int, second: int) -> bool:
        """Whether the completion in place `first` is better than the one in place `second`; no bad one is."""
        return not self.all_bad and self.ranks[first] < self.ranks[second]


CHOICES: dict[str, Ranking] = {
    "a": Ranking(ranks=(1, 2)),
    "b": Ranking(ranks=(2, 1)),
    "tie": Ranking(ranks=(1, 1)),
    "both_bad": Ranking(ranks=(1, 1), all_bad=True),
}
"""Answers to a question about two completions, as rankings."""


class Comparison(Record):
    """Completions of a prompt as annotators get them: the key that un-blinds a judgement.

    `id` is the record's id in the annotation tool. It is made of the prompt and the texts in their order.
    Nothing that is sent there reveals which policy answered, which completion it is, or the purpose.
    """

    prompt_id: Id
    completions: tuple[Id, ...] = Field(min_length=2, max_length=MOST_COMPARED)
    """In the order in which they are shown, as `texts`: A, B, C, D."""
    texts: tuple[str, ...]
    everyone: bool
    """Every annotator judges it, else a single one does."""
    purpose: Purpose = "comparison"
    about: Id | None = None
    """Of a retest, an adjudication and a correction: the comparison that they repeat."""
    expected: Ranking | None = None
    """Of gold: what is right on factuality. Whoever prefers a completion ranked worse there errs."""
    selected: SelectedBy | None = None
    """Only what is measured on those selected by lot holds for all."""


class Judgement(Record):
    """An annotator's judgement of completions of the same prompt, already un-blinded.

    It belongs to the prompt and the texts, whatever else of a recipe changes. `completions` and `texts` keep
    the order that the annotator saw. What annotators typed (`corrected`, `rationale`) is untrusted text.
    """

    comparison: Id
    """The `Comparison` record it judges."""
    prompt_id: Id
    completions: tuple[Id, ...] = Field(min_length=1, max_length=MOST_COMPARED)
    texts: tuple[str, ...]
    kind: JudgementKind
    annotator: str
    annotator_kind: AnnotatorKind
    factuality: Ranking | None = None
    """None: a rating says nothing about the order."""
    behaviour: Ranking | None = None
    thumbs: tuple[bool | None, ...] = ()
    """Whether each completion is good on its own; None where nothing was said. Empty: about none."""
    errors: tuple[tuple[ErrorType, ...], ...] = ()
    """What is wrong in each completion. Empty: nothing was marked."""
    purpose: Purpose = "comparison"
    about: Id | None = None
    expected: Ranking | None = None
    audio_unusable: bool = False
    corrected: str | None = None
    """A better completion than all, in the annotator's words."""
    rationale: str | None = None
    submitted_at: str | None = None
    """ISO 8601 in UTC, by the server's clock."""
    seconds: float | None = Field(None, ge=0)
    """From the annotator's previous submission to this one; None for the first and after a break."""
    heard: float | None = Field(None, ge=0, le=1)
    """Share of the clip this annotator had played by then; the least over several clips. None: unknown."""

    @classmethod
    def of(
        cls, comparison: Comparison, annotator: str, annotator_kind: AnnotatorKind, **answers: Any
    ) -> Judgement:
        """A judgement of a comparison in the order in which it was shown.

        Args:
            comparison: what is judged.
            annotator: who judges it; a second judgement of theirs has the same id.
            annotator_kind: of annotator.
            answers: the other fields.
        """
        copied = ("prompt_id", "completions", "texts", "purpose", "about", "expected")
        return cls(
            id=stable_id(comparison.id, annotator),
            comparison=comparison.id,
            kind="choice" if len(comparison.texts) == 2 else "ranking",
            annotator=annotator,
            annotator_kind=annotator_kind,
            **{name: getattr(comparison, name) for name in copied},
            **answers,
        )

    def ranking(self, axis: Axis) -> Ranking | None:
        """The order on an axis."""
        return self.factuality if axis == "factuality" else self.behaviour

    @model_validator(mode="after")
    def _is_about_its_completions(self) -> Judgement:
        n = len(self.completions)
        rankings = [item.ranks for item in (self.factuality, self.behaviour, self.expected) if item]
        lists = [self.texts, *rankings, *(item for item in (self.thumbs, self.errors) if item)]
        if any(len(item) != n for item in lists):
            raise ValueError(f"texts, ranks, thumbs and errors are not all of {n} completions")
        return self


class PreferencePair(Record):
    """`chosen` is better than `rejected` on one axis, and on what evidence: where a reward decided, 1."""

    prompt_id: Id
    system: str | None = None
    """The system prompt; None: the model's own."""
    audios: tuple[str, ...]
    """As of a `Prompt`."""
    history: tuple[Turn, ...] = Field((), exclude_if=lambda history: not history)
    question: str
    chosen: str
    rejected: str
    axis: PairAxis
    judges: int = Field(1, ge=1)
    """How many annotators compared the two."""
    agreement: float = Field(gt=0, le=1)
    """The share of them, each by their weight, who prefer `chosen`; a tie is half a vote."""
    agreement_low: float | None = Field(None, ge=0, le=1)
    """Of its 95 % interval; None where it is no sample of annotators."""
    agreement_high: float | None = Field(None, ge=0, le=1)
    evidence: float = Field(1.0, gt=0, le=1)
    """How much the pair counts in training: see `pairs.evidence`."""
    annotators: tuple[str, ...] = ()
    """Who preferred `chosen`."""

    @property
    def audios_per_turn(self) -> tuple[tuple[str, ...], ...]:
        """The clips that each question brings, the last one's included."""
        return _clips_per_turn(self.history, self.audios)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that a policy answers."""
        return conversation(self.question, self.audios, self.system, self.history)

    @model_validator(mode="after")
    def _turns_ask_and_clips_add_up(self) -> PreferencePair:
        _refuse_empty_turns(_questions(self.history, self.question), self.audios_per_turn)
        return self


class CompletionScore(Record):
    """What a completion is worth to a reward, as a whole and by part. `id` is the completion's."""

    prompt_id: Id
    reward: float | None = Field(allow_inf_nan=False)
    """Sum of the parts times their weights; None where no part says anything."""
    parts: dict[str, float | None]


class ContentPart(BaseModel):
    """Text, or the place of a clip, within a message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["audio", "text"]
    text: str | None = None
    """None for a clip, whose path stands in the record's `audios`."""

    @model_validator(mode="after")
    def _text_has_text(self) -> ContentPart:
        if (self.type == "text") != (self.text is not None):
            raise ValueError(f"a part of type {self.type!r} with text {self.text!r}")
        return self


class Message(BaseModel):
    """A message of a conversation in TRL's form: who says it, and its text and clips in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: tuple[ContentPart, ...] = Field(min_length=1)

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part.text or "" for part in self.content)

    @property
    def n_clips(self) -> int:
        """Clips that have a place in it."""
        return sum(part.type == "audio" for part in self.content)


def message_of(role: Role, text: str, n_clips: int = 0) -> Message:
    """A message with its clips before its text."""
    clips = [ContentPart(type="audio")] * n_clips
    return Message(role=role, content=(*clips, ContentPart(type="text", text=text)))


def conversation(
    question: str, audios: tuple[str, ...], system: str | None = None, history: Sequence[Turn] = ()
) -> tuple[Message, ...]:
    """The messages of a `Prompt`, or of any question with these: each turn's clips stand before its text."""
    messages = [message_of("system", system)] if system else []
    *earlier, last = _clips_per_turn(history, audios)
    for turn, own in zip(history, earlier, strict=True):
        messages += [message_of("user", turn.question, len(own)), message_of("assistant", turn.answer)]
    return (*messages, message_of("user", question, len(last)))


class Label(Record):
    """A completion that is good or bad on its own, without another to compare it with: what KTO trains on."""

    prompt_id: Id
    prompt: tuple[Message, ...] = Field(min_length=1)
    """A conversation that ends with a user's message."""
    completion: str = Field(min_length=1)
    audios: tuple[str, ...]
    """Clips of the prompt, one for each part of type audio, in order."""
    label: StrictBool
    """True: desirable."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How much it counts beside other labels."""
    source: str = "imported"
    """Where the label comes from, e.g. the file, the annotators or the reward."""
    judges: int = Field(1, ge=1)
    agreement: float = Field(1.0, gt=0, le=1)
    """The share of its judges who say so."""

    @model_validator(mode="after")
    def _user_has_the_last_word_and_clips_add_up(self) -> Label:
        roles = [message.role for message in self.prompt]
        turns = roles[1:] if roles[0] == "system" else roles
        if len(turns) % 2 == 0 or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
            raise ValueError(f"a prompt alternates from user to user, got {', '.join(roles[:6])}")
        n_clips = sum(message.n_clips for message in self.prompt)
        if n_clips != len(self.audios):
            raise ValueError(
                f"the prompt has places for {n_clips} clips, but there are {len(self.audios)} audios"
            )
        return self


def stable_id(*parts: object) -> str:
    """A short id that is the same on every machine: 16 hex digits of sha256 over the parts."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def comparison_id(prompt_id: str, texts: Sequence[str]) -> str:
    """The id of a comparison: whoever knows the texts can make it, so it does not tell its purpose."""
    return stable_id(json.dumps([prompt_id, *texts]))
