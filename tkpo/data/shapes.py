"""The shapes that a sample may come in, and what can be wrong with it.

Alpaca (`instruction`, `input`, `output`; `system`, `history`), ShareGPT (`conversations` of `from` and `value`), chat
(`messages` of `role` and `content`), TRL's prompt-completion (strings or chat), and for pairs `chosen` and `rejected`
beside an instruction or prompt, or as two whole conversations.
"""

from __future__ import annotations

from collections.abc import Iterator

from tkpo.attributes import LANGUAGES

SHAPES = (
    "Alpaca (instruction, input, output), ShareGPT (conversations), chat (messages), TRL (prompt, completion; for "
    "pairs prompt, chosen, rejected)"
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CHOICES = {"lang": LANGUAGES, "form": ("article", "topic"), "length": ("short", "long")}
UNUSED = ("tools", "images", "videos", "audios")  # what LLaMA-Factory's files may have beside a text


def to_alpaca(row: dict, needs_output: bool = True) -> dict:
    """A row of any shape with Alpaca's fields; the others stay as they are.

    The response is the last turn, which is the assistant's; the turn before it is the instruction, the first may be
    the system's, those between are `history`. String prompts are the user's turn, string completions the response.

    row: an Alpaca row is returned as it is.
    needs_output: whether a conversation must end in a response.

    Raises:
        ValueError: what is wrong with a conversation.
    """
    chats = [key for key in ("conversations", "messages", "prompt") if row.get(key) is not None]
    if "instruction" in row:
        if chats:
            raise ValueError(f"it has both 'instruction' and {chats[0]!r}: keep one of them")
        return row
    row = dict(row)
    if chats:
        key = chats[0]
        if len(chats) > 1:
            raise ValueError(f"it has both {chats[0]!r} and {chats[1]!r}: keep one of them")
        prompt = row.pop(key)
        if key == "prompt":
            return {**row, **_prompted(prompt, row, needs_output)}
        turns = _turns(prompt, key)
        output = {}
        if turns[-1][0] == "assistant":
            output = {"output": turns.pop()[1]}
        elif needs_output and "chosen" not in row:
            raise ValueError(f"the last turn of {key!r} is not the assistant's: there is no response")
        answers = {name: _answer(row[name], name) for name in ("chosen", "rejected") if name in row}
        return {**row, **_asked(turns, key, row), **output, **answers}
    if isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):  # TRL's implicit prompt
        chosen, rejected = (_turns(row[name], name) for name in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1] or not chosen[:-1]:
            raise ValueError("'chosen' and 'rejected' must be one conversation with two last turns")
        answers = {"chosen": chosen[-1][1], "rejected": rejected[-1][1]}
        return {**row, **_asked(chosen[:-1], "chosen", row), **answers}
    return row


def _prompted(prompt, row: dict, needs_output: bool) -> dict:
    """Alpaca's fields of a `prompt` and what answers it: `completion`, or `chosen` and `rejected`."""
    answers = {name: row.pop(name) for name in ("completion", "chosen", "rejected") if name in row}
    if needs_output and not answers:
        raise ValueError("a 'prompt' without 'completion', or 'chosen' and 'rejected'")
    if isinstance(prompt, str):
        for name, answer in answers.items():
            if not isinstance(answer, str):
                raise ValueError(f"'prompt' is text, but {name!r} is {type(answer).__name__}")
        asked = {"instruction": prompt}
    else:
        asked = _asked(_turns(prompt, "prompt"), "prompt", row)
        answers = {name: _answer(answer, name) for name, answer in answers.items()}
    return {**asked, **{"output" if name == "completion" else name: answer for name, answer in answers.items()}}


def _answer(value, name: str) -> str:
    turns = (
        [("assistant", value)]
        if isinstance(value, str)
        else _turns(value if isinstance(value, list) else [value], name)
    )
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise ValueError(f"{name!r} must be one turn, the assistant's")
    return turns[0][1]


def _asked(turns: list[tuple[str, str]], key: str, row: dict) -> dict:
    """`instruction`, `input` and, where there are any, `system` and `history` of turns that end with the user's."""
    turns, fields = list(turns), {}
    if turns and turns[0][0] == "system":
        if row.get("system"):
            raise ValueError(f"it has a field 'system' and a system turn in {key!r}: keep one of them")
        fields["system"] = turns.pop(0)[1]
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(
                f"the turns of {key!r} must be the user's and the assistant's in turn, after a system turn"
            )
    if len(turns) % 2 == 0:
        raise ValueError(f"{key!r} has no turn of the user before the response")
    if len(turns) > 1:
        fields["history"] = [[turns[i][1], turns[i + 1][1]] for i in range(0, len(turns) - 1, 2)]
    return {"instruction": turns[-1][1], "input": "", **fields}


def _turns(value, key: str) -> list[tuple[str, str]]:
    """(role, text) of each turn of a conversation."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is {'empty' if value == [] else type(value).__name__}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} of {key!r} is {type(turn).__name__}, not an object")
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise ValueError(f"turn {number} of {key!r} has the role {role!r}; there are {', '.join(ROLES)}")
        if isinstance(text, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in text):
            text = "".join(part["text"] for part in text)
        if not isinstance(text, str):
            raise ValueError(f"turn {number} of {key!r} has no text")
        turns.append((ROLES[role], text))
    return turns


def record_faults(row: dict, pairs: bool = False, needs_output: bool = True) -> Iterator[str]:
    """What is wrong with a row of any shape.

    row: as a file has it.
    pairs: whether `chosen` and `rejected` are wanted in place of `output`.
    needs_output: whether these are wanted at all.
    """
    try:
        row = to_alpaca(row, needs_output)
    except ValueError as error:
        yield str(error)
        return
    outputs = (("chosen", "rejected") if pairs else ("output",)) if needs_output else ()
    if "instruction" not in row and not any(key in row for key in outputs):
        yield f"no field 'instruction'; its fields are {', '.join(map(repr, row)) or 'none'}, and a record is {SHAPES}"
        return
    yield from _text_faults(row, outputs)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in history
    ):
        yield "field 'history' is not a list of pairs [user's turn, assistant's turn]"
    for key in UNUSED:
        if row.get(key):
            yield f"field {key!r} is not supported: TKPO reads text alone"
    if pairs and row.get("chosen") is not None and row.get("chosen") == row.get("rejected"):
        yield "chosen and rejected are the same text"
    yield from _label_faults(row)


def _text_faults(row: dict, outputs: tuple[str, ...]) -> Iterator[str]:
    """Of an Alpaca row's texts; `outputs` are the fields of its responses."""
    for key in ("instruction", *outputs):
        if key not in row:
            yield f"no field {key!r}"
        elif not isinstance(row[key], str):
            yield f"field {key!r} is {type(row[key]).__name__}, not text"
        elif not row[key].strip():
            yield f"field {key!r} is empty"
    for key in ("input", "system"):
        if not isinstance(row.get(key) or "", str):
            yield f"field {key!r} is {type(row[key]).__name__}, not text"


def _label_faults(row: dict) -> Iterator[str]:
    """Of the fields that say what a row is, all of which may be missing."""
    for key, choices in CHOICES.items():
        if key in row and row[key] not in choices:
            yield f"field {key!r} is {row[key]!r}, not one of {', '.join(choices)} (or leave it out)"
    for key in ("attribute", "axis"):
        if key in row and not (isinstance(row[key], str) and row[key]):
            yield f"field {key!r} is {row[key]!r}, not a name (or leave it out)"
    if not isinstance(row.get("id"), (str, int, type(None))):
        yield f"field 'id' is {type(row['id']).__name__}, not text or a number"
