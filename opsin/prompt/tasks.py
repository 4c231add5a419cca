"""A task by its name: the prompt that a family was trained on for it, put into a conversation."""

from __future__ import annotations

import dataclasses
import difflib

from opsin.errors import InputError
from opsin.families.base import Family
from opsin.prompt.messages import Prompt, parse_messages
from opsin.types import Message, Task, Text


def find_task(family: Family, name: str) -> Task:
    """A family's task; InputError that names those there are if it has no such one."""
    task = family.tasks.get(name)
    if task is None:
        close = difflib.get_close_matches(name, family.tasks, n=1)
        known = ", ".join(family.tasks) or "none"
        raise InputError(
            f"This model has no task {name!r}",
            why=f"its tasks are: {known}",
            remedy=f"Did you mean {close[0]}?" if close else "Ask in the prompt instead",
            param="task",
        )
    return task


def task_messages(family: Family, name: str, prompt: Prompt) -> tuple[Message, ...]:
    """The conversation with its last message's text turned into the task's prompt.

    That text is what the task is given, such as the thing to locate. Raises InputError where a task
    needs one and it is empty, or takes none and it is not.
    """
    task = find_task(family, name)
    messages = parse_messages(prompt) or (Message("user", ()),)
    last = messages[-1]
    words = last.text.strip()
    if task.takes_text and not words:
        raise InputError(
            f"The task {name!r} needs words",
            why=f"its prompt is {task.prompt!r}",
            remedy="Give them as the prompt",
            param="prompt",
        )
    if words and not task.takes_text:
        raise InputError(
            f"The task {name!r} takes no words of yours",
            why=f"its prompt is {task.prompt!r}",
            remedy="Leave the prompt empty, or leave the task out",
            param="prompt",
        )
    media = tuple(part for part in last.content if not isinstance(part, Text))
    asked = dataclasses.replace(last, content=(*media, Text(task.render(words))))
    return (*messages[:-1], asked)
