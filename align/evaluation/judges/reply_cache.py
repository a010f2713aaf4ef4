"""A judge's replies, kept on disk, so that no question is paid for twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from align.evaluation.judged_answers import State
from align.evaluation.judges.chat_model import (
    UNANSWERED,
    ChatModel,
    JudgeMisconfigured,
    Message,
    Reply,
    parameter_advice,
)
from align.evaluation.judges.prompt import without_thought
from align.run_folder.progress import Progress

_EMPTY = 5
"""Replies that end before any answer, at which a judge is stopped if most of its replies do."""


class ReplyCache:
    """Replies by the hash of the request, in one file of JSON lines that only grows.

    Each reply is one write: once `put` returns, no death of the process can lose it, and where the whole
    machine dies, at most the last replies are lost and requested again. Processes may share the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._replies = dict(_read(path))

    def get(self, keys: Iterable[str]) -> dict[str, Reply]:
        """The replies that are there, by key."""
        return {key: self._replies[key] for key in keys if key in self._replies}

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        line = json.dumps({"key": key, **reply._asdict()}) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
        self._replies[key] = reply

    def complete(
        self,
        model: ChatModel,
        prompt_of: Callable[[str], Sequence[Message]],
        keys: Collection[str],
        state_of: Callable[[str, Reply], State],
        label: str | None,
    ) -> dict[str, Reply]:
        """Replies to prompts by key: those that are there, and the model's to the rest, kept as they come.

        Args:
            model: is sent what is missing.
            prompt_of: the prompt of a key; called when it is sent, so that clips need not be in memory all at
                once.
            keys: of the prompts, each once.
            state_of: what a reply is worth; it may raise `JudgeFailed` to stop.
            label: names the work in progress reports; None shows none.

        Raises:
            JudgeFailed: the model cannot be used, or most of its replies end before any answer.
        """
        replies = self.get(keys)
        missing = [key for key in keys if key not in replies]
        came = unscored = empty = 0

        def keep(index: int, reply: Reply) -> None:
            nonlocal came, unscored, empty
            key = missing[index]
            if reply.finish_reason not in UNANSWERED:
                self.put(key, reply)
            replies[key] = reply
            state = state_of(key, reply)
            ends_early = reply.finish_reason == "length" or not (without_thought(reply.text) or "").strip()
            came += 1
            unscored += state != "scored"
            empty += state == "invalid" and ends_early
            if progress:
                progress.update(len(replies), unscored=unscored)
            if empty >= _EMPTY and 2 * empty > came:
                raise _never_answers(model, empty, came)

        with Progress(label, len(keys)) if label else nullcontext() as progress:
            if progress:
                progress.update(len(replies))
            if missing:
                model.reply(_Prompts(prompt_of, missing), keep)
        return replies


class _Prompts(Sequence[Sequence[Message]]):
    """Prompts of keys, each made when it is read."""

    def __init__(self, prompt_of: Callable[[str], Sequence[Message]], keys: Sequence[str]) -> None:
        self._prompt_of, self._keys = prompt_of, keys

    def __getitem__(self, index: Any) -> Any:
        return self._prompt_of(self._keys[index])

    def __len__(self) -> int:
        return len(self._keys)


def _never_answers(model: ChatModel, empty: int, came: int) -> JudgeMisconfigured:
    limits = [name for name in model.parameters if name.startswith("max_")]
    name = limits[0] if limits else "max_tokens"
    value = model.parameters.get(name)
    more = parameter_advice({name: 4 * value if isinstance(value, int) else 4096})
    return JudgeMisconfigured(
        f"{model.name}: {empty} of {came} replies end before any scores, as a thinking model's do where "
        f"{name} ({value}) is too small. Next: raise {name}, {more}, or have it think less"
    )


def _read(path: Path) -> Iterator[tuple[str, Reply]]:
    """The file's replies; a torn last line (the machine died) is cut off so that the next line is whole."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                file.truncate(whole)
                return
            whole += len(line)
            try:
                row = json.loads(line)
                yield row.pop("key"), Reply(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{path}:{number}: is not a kept reply. Delete this line: that one is requested again"
                ) from None
