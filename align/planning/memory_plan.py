"""How a step's examples are passed through a model so that they fit the memory; with the reason in words.

As many at a time as fit with nothing computed again. If not even one does, one at a time and the fewest
layers computed again (arXiv:1604.06174) that make it fit. Arithmetic alone: see `estimate`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from align.planning import estimate
from align.planning.estimate import Job, Memory, Shape, Strategy

MARGIN = 1.2
"""Activations may take so many times what is estimated: temporary tensors, fragmentation, our own error."""
BY_HAND = ("gradient_accumulation_steps", "activation_checkpointing", "gradient_checkpointing")
"""Names in a recipe's `trl:` of which any one says that its author has planned."""


class Plan(NamedTuple):
    """For each process and step `passes` of `examples` each, with the first `recomputed` layers again."""

    passes: int
    examples: int
    recomputed: int
    memory: Memory
    """Estimated of a process, with the longest examples."""
    room: float
    """Bytes that their activations may be estimated to take."""
    why: str

    @property
    def fits(self) -> bool:
        """Whether even the longest examples should."""
        return self.memory.activations <= self.room


def by_hand(trl: Mapping[str, Any]) -> bool:
    """Whether a recipe's `trl:` mapping leaves nothing to plan."""
    return any(name in trl for name in BY_HAND)


def plan(
    shape: Shape,
    example: Job,
    strategy: Strategy,
    workers: int,
    offload: str,
    *,
    examples: int,
    available: float,
) -> Plan:
    """How one process passes its `examples` of a step.

    Args:
        shape: of the model.
        example: what a pass of the longest example alone does; two sequences if it is a preference pair.
        strategy: see `estimate.memory`.
        workers: over which things are spread.
        offload: see `estimate.memory`.
        examples: per process and step.
        available: bytes that the process may use.
    """
    standing = estimate.memory(shape, example, strategy, workers, offload).standing
    room = (available - standing) / MARGIN
    job = _chosen(shape, example, strategy, examples, room)
    n = job.sequences // example.sequences
    found = estimate.memory(shape, job, strategy, workers, offload)
    made = Plan(examples // n, n, job.recomputed, found, room, "")
    if made.fits:
        return made._replace(why=_why(made, shape, example, strategy))
    return made._replace(
        why=f"does not fit {_size(available)}: weights, gradients, optimizer and overhead take "
        f"{_size(standing)}, activations of one {_noun(example)} {_size(found.activations)} although "
        f"{_again(made, shape, example)}. {advice(found, strategy)}. It is tried all the same"
    )


def _chosen(shape: Shape, example: Job, strategy: Strategy, examples: int, room: float) -> Job:
    """The first that fits of: more or fewer whole examples at a time, one with few or many layers again.

    The last layer of all is never worth it (see `estimate.activations`). If nothing fits, the thriftiest.
    """
    sizes = [n for n in range(examples, 0, -1) if examples % n == 0]
    jobs = [example.times(n) for n in sizes]
    jobs += [example._replace(recomputed=n) for n in range(1, estimate.layers(shape, example))]
    return next((job for job in jobs if estimate.activations(shape, job, strategy) <= room), jobs[-1])


# -------------------------------------------------------------------------- in words


def _why(made: Plan, shape: Shape, example: Job, strategy: Strategy) -> str:
    noun, n = _noun(example), made.examples
    passes = "1 pass" if made.passes == 1 else f"{made.passes} passes"
    told = f"{passes} of {n} {noun}{'s' * (n > 1)}"
    may = f"{_size(made.room)} may be used for them"
    if made.recomputed:
        kept = _size(estimate.activations(shape, example, strategy))
        again = _again(made, shape, example)
        return f"{told}, {again}: all activations of one {noun} take {kept}, {may}"
    if made.passes == 1:
        return f"{told}: activations of {_size(made.memory.activations)}, {may}; nothing is computed again"
    examples = n * made.passes
    larger = next(size for size in range(n + 1, examples + 1) if examples % size == 0)
    would = _size(estimate.activations(shape, example.times(larger), strategy))
    return f"{told}: {larger} would keep {would} of activations, {may}; nothing is computed again"


def _again(made: Plan, shape: Shape, example: Job) -> str:
    return f"{made.recomputed} of {estimate.layers(shape, example)} layers are computed again"


def _noun(example: Job) -> str:
    return "pair" if example.sequences == 2 else "example"


def advice(found: Memory, strategy: Strategy) -> str:
    """What to change where `found` does not fit."""
    if found.activations > 0.5 * found.total:
        return (
            "Activations are most of it: leave out the longest examples (the corpus' max_duration_s) or, "
            "where trl: divides the steps by hand, let the stage plan"
        )
    if strategy in ("ddp", "zero2"):
        return "Take strategy: zero3, more workers, or lora"
    return "Take more workers, offload: optimizer, or lora"


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"
