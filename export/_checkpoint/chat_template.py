"""A checkpoint's chat template, rendered on probes, as data that needs no template engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from vlmedge.spec import ChatTask

from .folder import read_json

Message = dict[str, Any]
_SYSTEM, _Q1, _A1, _Q2 = "SYSTEMPROBE", "FIRSTPROBE", "REPLYPROBE", "SECONDPROBE"


def read_chat(folder: Path, write: str, placeholder: str, kind: str = "image") -> ChatTask | None:
    """Read a chat template.

    Args:
        folder: The checkpoint.
        write: The task whose wiring a conversation uses.
        placeholder: The text of the image token, or the video token.
        kind: Type of a content entry in the template: "image" or "video".

    Returns:
        Its parts, or none where there is no template, or one that is not put together from such
        parts: every conversation that is tried must come out the same both ways.
    """
    template = _template(folder)
    if template is None:
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def render(*messages: Message) -> str:
        found = tokenizer.apply_chat_template(
            [_shown(message, kind) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert isinstance(found, str)
        return found

    try:
        found = _parts(render, write, placeholder)
    except Exception:  # a template raises what it likes at what it does not know
        return None
    return found if found is not None and _agrees(found, render, placeholder) else None


def _template(folder: Path) -> str | None:
    """Find the template: a file of its own, or in a config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = (read_json(folder, name) or {}).get("chat_template")
        if isinstance(found, str):
            return found
    return None


def _parts(render: Any, write: str, placeholder: str) -> ChatTask | None:
    """Take three short conversations apart."""
    opening, closing = render(_user(_Q1)).split(_Q1)
    turns = render(_user(_Q1), _assistant(_A1), _user(_Q2))
    middle = turns.split(_A1)[1].split(_Q2)[0]  # from a reply to the next question
    # what a question of the middle and one of the start have before them alike is the user's
    user = _common_end(opening, middle)
    start, reply_end = opening.removesuffix(user), middle.removesuffix(user)
    one, two = (render(_user(_Q1, images)).split(_Q1)[0] for images in (1, 2))
    place = one.find(placeholder)
    image = two[place : place + len(two) - len(one)]
    if place < 0 or image.count(placeholder) != 1 or not one[place:].startswith(image):
        return None
    seen = f"{one[:place]}{{images}}{one[place + len(image) :]}".removeprefix(start)
    system = None
    try:
        before, after = render(_message("system", _SYSTEM), _user(_Q1)).split(_Q1)[0].split(_SYSTEM)
        if after.endswith(user):
            system = f"{before}{{text}}{after.removesuffix(user)}"
    except Exception:  # many templates know no system text
        system = None
    return ChatTask(
        write=write,
        start=start,
        user=f"{user}{{text}}{closing}",
        user_images=f"{seen}{{text}}{closing}",
        image=image.replace(placeholder, "{image}"),
        reply_end=reply_end,
        system=system,
    )


def _agrees(found: ChatTask, render: Any, placeholder: str) -> bool:
    """Put conversations together from the parts, and compare."""
    image = found.image.replace("{image}", placeholder)
    shown = found.user_images.replace("{images}", 2 * image).replace("{text}", _Q1)
    said = found.user.replace("{text}", _Q2)
    later = found.user_images.replace("{images}", image).replace("{text}", _Q2)
    asked = found.start + found.user.replace("{text}", _Q1)
    replied = render(_user(_Q1), _assistant(_A1), _user(_Q2)).split(_A1)[0]
    # a reply that is written brings its own space along; one that is quoted gets it here
    space = replied.removeprefix(asked)
    if space.strip():
        return False
    reply = space + _A1 + found.reply_end
    tried = [
        (found.start + shown, (_user(_Q1, 2),)),
        (
            found.start + shown + reply + said,
            (_user(_Q1, 2), _assistant(_A1), _user(_Q2)),
        ),
        (
            asked + reply + later,
            (_user(_Q1), _assistant(_A1), _user(_Q2, 1)),
        ),
    ]
    if found.system is not None:
        whole = found.system.replace("{text}", _SYSTEM) + shown
        tried.append((whole, (_message("system", _SYSTEM), _user(_Q1, 2))))
    return all(text == render(*messages) for text, messages in tried)


def _user(text: str, images: int = 0) -> Message:
    return _message("user", text, images)


def _assistant(text: str) -> Message:
    return _message("assistant", text)


def _message(role: str, text: str, images: int = 0) -> Message:
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    return {"role": role, "content": content}


def _shown(message: Message, kind: str) -> Message:
    """Put things of another kind in the place of a message's images."""
    content = [{"type": kind} if p["type"] == "image" else p for p in message["content"]]
    return {**message, "content": content}


def _common_end(left: str, right: str) -> str:
    count = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        count += 1
    return left[len(left) - count :]


def write_template(folder: Path, template: str) -> None:
    """Give a checkpoint of the tests a chat template, as transformers saves it."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def ask_template(chat: ChatTask) -> str:
    """Return the prompt of a conversation's first question about one picture."""
    asked = chat.start + chat.user_images.replace("{images}", chat.image)
    return asked.replace("{text}", "{question}")


def caption_template(chat: ChatTask, request: str) -> str:
    """Return the prompt of a conversation whose first question is to describe one picture."""
    return ask_template(chat).replace("{question}", request) + "{prompt}"
