"""Records -> the rows that `SFTCollator` reads. Every text of a corpus passes here before a model sees it."""

from __future__ import annotations

from align.models.chat import assistant, user
from align.training.collate import Row
from preference_data.prompts.prompts import PromptFormat, prompt_of, refuse_control, target_of
from preference_data.schema import Chat, TaskExample


def task_row(example: TaskExample, prompt_format: PromptFormat) -> Row:
    """A pre-training example: a prompt in the prompt format and its target, without a chat around them.

    Raises:
        BadExample: the example is not as its task wants it.
    """
    prompt, target = prompt_of(example, prompt_format), target_of(example)
    return {"messages": None, "prompt": prompt, "completion": target, "audios": list(example.audios)}


def chat_row(chat: Chat) -> Row:
    """A chat: each turn's clips stand before its question, numbered through the chat ("Audio 1: ...").

    A turn without a question is voice chat; a chat without clips is plain text.

    Raises:
        BadExample: a text holds a token that steers the model.
    """
    messages = []
    for turn, clips in zip(chat.turns, chat.audios_per_turn, strict=True):
        refuse_control(chat.id, turn.question, turn.answer)
        messages += [user(turn.question, len(clips)), assistant(turn.answer)]
    return {"messages": messages, "prompt": None, "completion": None, "audios": list(chat.audios)}
