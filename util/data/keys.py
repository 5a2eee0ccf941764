"""Which keys of a record and of its messages mean something here.

A key that would change what is trained is honoured, or refused by name; all others are ignored,
and check_data.py lists them. Null, and what is empty, is as good as no key.
"""

from collections.abc import Iterator

# What a conversation is made of; the first two are its formats.
RECORD_KEYS = {"messages", "conversations", "image", "images", "video", "videos", "system"}
RECORD_KEYS |= {"objects"}  # boxes.py
MESSAGE_KEYS = {"role", "content", "from", "value", "loss", "weight", "reasoning_content"}
MESSAGE_KEYS |= {"image", "images", "video", "videos"}  # refused where they are read

_NO_TOOLS = "tools are not trained here: write calls and their results into the text of messages"
_NO_SOUND = "sound is not read: leave the sample out"
_NO_PAIRS = "pairs are not trained here: keep the answer that is to be learned, as a message"
_OTHER_NAME = 'reasoning is read from "reasoning_content": rename it'
REFUSED_IN_RECORDS = {
    **dict.fromkeys(("tools", "functions"), _NO_TOOLS),
    **dict.fromkeys(("audio", "audios"), _NO_SOUND),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _NO_PAIRS),
    **dict.fromkeys(("rejected_images", "kto_tag"), _NO_PAIRS),
    **dict.fromkeys(("positive_messages", "negative_messages"), _NO_PAIRS),
    "history": "earlier turns belong into the list of messages",
}
REFUSED_IN_MESSAGES = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), _NO_TOOLS),
    **dict.fromkeys(("audio", "audios"), _NO_SOUND),
    **dict.fromkeys(("reasoning", "thinking"), _OTHER_NAME),
}


def is_empty(value) -> bool:
    """Return whether a key with this value is as good as none: rows of Arrow carry every key."""
    return value is None or value in ("", [], {})


def refuse_keys(owner: dict, refused: dict[str, str], where: str = "") -> None:
    """Raise ValueError where `owner` has a key that is refused, saying what to do."""
    for key, advice in refused.items():
        if not is_empty(owner.get(key)):
            raise ValueError(f'{where}has a key "{key}": {advice}')


def ignored_keys(record: dict) -> Iterator[str]:
    """Yield which keys of a conversation are not read: "id", "message.name", "item.detail"."""
    yield from (key for key in record if key not in RECORD_KEYS and not is_empty(record[key]))
    for turn in record.get("messages") or record["conversations"]:
        for key in turn:
            if key not in MESSAGE_KEYS and not is_empty(turn[key]):
                yield f"message.{key}"
    for message in record.get("messages") or ():
        # The keys of an item itself are all read, or refused.
        for item in message["content"] if isinstance(message["content"], list) else ():
            for url in (item.get("image_url"), item.get("video_url")):
                if isinstance(url, dict) and "detail" in url:
                    yield "item.detail"


def is_trained(message: dict, where: str) -> bool:
    """Return what "loss" (of ms-swift) or "weight" (of OpenAI) say of a message.

    Raises ValueError where they say anything but yes or no.
    """
    told = {key: message[key] for key in ("loss", "weight") if message.get(key) is not None}
    for key, value in told.items():
        if value not in (True, False) or isinstance(value, str):
            raise ValueError(f'{where}: "{key}": {value!r}: must be true or false, 1 or 0')
    if len({bool(value) for value in told.values()}) > 1:
        raise ValueError(f'{where}: "loss" and "weight" contradict each other')
    return all(told.values())
