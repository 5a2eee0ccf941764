"""From a conversation to a sample: token ids, labels, patches, positions.

Everything that is wrong raises ValueError, naming the message and the file in it.
"""

import hashlib
import math
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import torch
from jinja2 import TemplateError

from util.data.boxes import place_boxes
from util.data.conversation import media_of, parse_conversation, text_of
from util.media.image import Remark
from util.media.source import check_local_file, describe, local_path, map_paths
from util.survive import time_limit
from util.vision_util import MediaShape, PixelPolicy, image_sizes, load_media, probe_media

IGNORE = -100  # label of a token that is not trained
# Others that stand between <| and |>, such as those of boxes or a user's own, are text.
CONTROL_TOKEN = re.compile(r"<\|(im_(start|end)|vision_(start|end)|[a-z]+_pad|endoftext)\|>")

RENDER_SECONDS = 30  # it takes milliseconds


@dataclass
class Sample:
    """One conversation, ready to be packed. All tensors are on the CPU."""

    input_ids: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, unshifted, -100 where not trained
    position_ids: torch.Tensor  # (3, T) int64, M-RoPE
    patches: torch.Tensor  # (num_patches, patch_dim) uint8
    grids: list[tuple[int, int, int]]  # (t, h, w) of each picture or clip, in order
    media_types: list[str]  # "image" or "video", of each
    second_per_grid_ts: list[float]  # of each clip, from one of its t frames to the next

    def media(self) -> Iterator[tuple[str, tuple[int, int, int], torch.Tensor]]:
        """Yield (media type, grid, patches) of each picture and clip."""
        sizes = [math.prod(grid) for grid in self.grids]
        return zip(self.media_types, self.grids, self.patches.split(sizes))


class SampleEncoder:
    """Turns conversations into samples, with the tokenizer and chat template of the model.

    `model` knows how positions are counted; nothing of it but the config is needed, so one on the
    meta device serves. `vision_inputs` returns, of patch grids, what a vision tower else computes
    of them; `write_boxes` returns, of a name, boxes and the type of the model, the text of both, as
    families.py has it. `folder`, in the methods, is where media paths are looked for after the
    current folder: that of the data file.
    """

    def __init__(
        self, processor, model, vision_inputs, write_boxes, policy: PixelPolicy, supervise: str
    ):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.chat_template = processor.chat_template or self.tokenizer.chat_template
        self.get_rope_index, self.vision_inputs = model.get_rope_index, vision_inputs
        self.write_boxes, self.model_type = write_boxes, model.config.model_type
        self.policy, self.supervise = policy, supervise
        self.image_token_id = processor.image_token_id
        self.video_token_id = processor.video_token_id
        ends = self.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        self.media_token_ids = {self.image_token_id, self.video_token_id, *ends}
        self.end_of_turn = "<|im_end|>"
        self.control_tokens = [
            token for token in self.tokenizer.get_added_vocab() if CONTROL_TOKEN.fullmatch(token)
        ]

    def digest(self) -> str:
        """Return a hash of everything beside the data that samples depend on."""
        settings = (self.chat_template, self.policy, self.supervise, self.model_type)
        names = type(self.processor).__name__, self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(repr((settings, names)).encode()).hexdigest()

    @property
    def num_dummy_tokens(self) -> int:
        """Tokens that the dummy segment takes of every micro-batch."""
        return self.policy.num_tokens(self.policy.dummy_grid)

    def render(
        self, messages: list[dict], add_generation_prompt: bool = False, thinking: bool = False
    ) -> str:
        """Return the text of `messages` by the model's own chat template, media unexpanded.

        thinking: the answer to generate begins with reasoning, where the template knows of it.
        Raises UserError where the template does not end: it is a program, of whoever wrote it.
        """
        name = self.tokenizer.name_or_path
        with time_limit(RENDER_SECONDS, lambda: f"the chat template of {name} does not end"):
            try:
                return self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    # Told each time: by themselves, some sizes of a family think, others do not.
                    enable_thinking=thinking,
                )
            except TemplateError as error:
                raise ValueError(f"the model's chat template refuses it: {error}") from error

    def decode_answer(self, token_ids: list[int]) -> str:
        """Return the text of an answer, with everything in it that can be trained."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        ends = {self.tokenizer.eos_token, self.tokenizer.pad_token, *self.control_tokens} - {None}
        return re.sub("|".join(map(re.escape, sorted(ends))), "", text)

    @property
    def reads_reasoning(self) -> bool:
        """Whether the chat template writes the reasoning of answers apart from them."""
        return "reasoning_content" in self.chat_template

    def without_reasoning(self, answer: str) -> str:
        """Return an answer as the template keeps it for later turns."""
        return answer.rpartition("</think>")[2].lstrip("\n") if self.reads_reasoning else answer

    def prepare(self, record, folder: Path = Path()) -> list[dict]:
        """Return the messages of a record: media paths found, boxes written, no control tokens."""
        messages = parse_conversation(record)
        for i, item in media_of(messages):
            try:
                find = partial(find_file, folder=folder)
                item[item["type"]] = map_paths(find, item[item["type"]])
            except (ValueError, OSError) as error:
                raise ValueError(f"message {i}: {error}") from error

        def sizes() -> list[tuple]:
            images = [(i, item) for i, item in media_of(messages) if item["type"] == "image"]
            return [self._at_media(image_sizes, i, item) for i, item in images]

        write = partial(self.write_boxes, model_type=self.model_type)
        place_boxes(messages, record.get("objects"), sizes, write)
        for i, message in enumerate(messages):
            reasoning = message.get("reasoning_content", "")
            if reasoning and not self.reads_reasoning:
                raise ValueError(
                    f'message {i}: has a key "reasoning_content": the model\'s chat template reads '
                    "none: leave it out, or make it part of content"
                )
            for token in self.control_tokens:
                if token in text_of(message) + reasoning:
                    raise ValueError(
                        f"message {i}: the text contains the control token {token}: remove it; "
                        "pictures are given as items of their own"
                    )
        return messages

    def segments(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """Split the rendered conversation into (text, is trained) pieces.

        Each piece is tokenized by itself. An answer therefore begins with the tokens that
        generation begins with, after a prompt that ends with the generation header; tokenized in
        one go, "assistant\\n" and an answer's leading newline become one token.
        """
        text, all_text = self.render(messages), self.supervise == "all"
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        untrained = {i for i in answers if not messages[i].get("loss", True)}
        if all_text and not untrained:
            return [(text, True)]
        if self.supervise == "last":
            untrained |= {*answers[:-1]}
        pieces, done = [], 0
        for i in answers:
            if i == 0 and not all_text:
                raise ValueError(
                    "message 0: an answer to nothing: put a user or system message before it, or "
                    "use --supervise all"
                )
            prompt = next(filter(text.startswith, self.prompts(messages[:i])), None)
            # No answer holds it: it is a control token.
            end = text.find(self.end_of_turn, len(prompt or "")) + len(self.end_of_turn)
            if prompt is None or end < len(prompt):
                raise ValueError(
                    f"message {i}: the model's chat template changes earlier turns when later ones "
                    "follow, so its answers cannot be told from its prompts"
                )
            answer = (text[len(prompt) : end], i not in untrained)
            pieces += [(text[done : len(prompt)], all_text), answer]
            done = end
        if not pieces:
            raise ValueError(
                "no assistant message, so there is nothing to train: add one, or use "
                "--supervise all"
            )
        return [*pieces, (text[done:], all_text)]

    def prompts(self, messages: list[dict]) -> Iterator[str]:
        """Yield what may stand before the answer to `messages`, the longest first.

        With the empty block of reasoning, with one opened, and, as templates write earlier turns,
        without. They are one and the same where a template knows no reasoning.
        """
        yield self.render(messages, add_generation_prompt=True)
        thinking = self.render(messages, add_generation_prompt=True, thinking=True)
        yield thinking
        yield thinking.removesuffix("<think>\n")

    def tokenize(self, pieces: list[tuple[str, bool]], media: list[MediaShape]) -> tuple:
        """Return input_ids and labels of `pieces`, with a placeholder for every media token."""
        input_ids, labels = [], []
        clips = iter([shape for shape in media if shape.metadata])
        frames = iter([(1, h, w) for t, h, w in (shape.grid for shape in media) for _ in range(t)])
        for text, is_trained in pieces:
            text = self.place_frames(text, clips)
            for token in self.tokenizer(text, add_special_tokens=False).input_ids:
                repeats = 1
                if token in (self.image_token_id, self.video_token_id):
                    repeats = self.policy.num_tokens(next(frames))
                trained = is_trained and token not in self.media_token_ids
                input_ids += [token] * repeats
                labels += [token if trained else IGNORE] * repeats
        # The first token of a sample would be predicted from the sample packed before it.
        labels[0] = IGNORE
        return input_ids, labels

    def place_frames(self, text: str, clips: Iterator[MediaShape]) -> str:
        """Return `text` with one placeholder for each frame of the clips that stand in it.

        The processor does it: that of Qwen3-VL writes the time before each frame. Such a time is
        text like any other; --supervise all trains it.
        """
        frames = []
        for _ in range(text.count(self.processor.video_token)):
            shape = next(clips)
            one_token = (shape.grid[0], self.policy.merge_size, self.policy.merge_size)
            clip = {"video_grid_thw": torch.tensor([one_token]), "video_metadata": [shape.metadata]}
            frames.append(self.processor.replace_video_token(clip, 0))
        (text,), _ = self.processor.get_text_with_replacements([text], videos_replacements=frames)
        return text

    def measure(self, record, folder: Path = Path()) -> tuple[int, ...]:
        """Return the numbers of tokens of a record: all, supervised, of images, of videos.

        And that of pairs of patches that attend to each other: those of one picture or two frames
        (fewer in Qwen2.5-VL's layers with windows); and what is odd about the media, as a Remark.
        Only headers of media are read. Raises ValueError where the record cannot be trained on.
        """
        messages = self.prepare(record, folder)
        media = [self._at_media(probe_media, i, item) for i, item in media_of(messages)]
        input_ids, labels = self.tokenize(self.segments(messages), media)
        num_supervised = len(labels) - labels.count(IGNORE)
        if num_supervised == 0:
            raise ValueError("nothing to train: no text is supervised")
        images, videos = (input_ids.count(t) for t in (self.image_token_id, self.video_token_id))
        pairs = sum(t * (h * w) ** 2 for t, h, w in (shape.grid for shape in media))
        remarks = reduce(operator.or_, [shape.remarks for shape in media], Remark.NONE)
        return len(input_ids), num_supervised, images, videos, pairs, remarks

    def encode(self, record, folder: Path = Path()) -> Sample:
        """Return the sample of a record, with all its media decoded."""
        messages = self.prepare(record, folder)
        return self._sample(messages, self.segments(messages))

    def encode_prompt(self, messages: list[dict], thinking: bool = False) -> Sample:
        """Return the sample of `messages` up to and with the generation header, without labels."""
        messages = self.prepare({"messages": messages})
        return self._sample(messages, [(self.render(messages, True, thinking), False)])

    def _sample(self, messages: list[dict], pieces: list[tuple[str, bool]]) -> Sample:
        items = list(media_of(messages))
        media_types = [item["type"] for _, item in items]
        loaded = [self._at_media(load_media, i, item) for i, item in items]
        media = [shape for _, shape in loaded]
        input_ids, labels = (torch.tensor(ids) for ids in self.tokenize(pieces, media))
        grids = [shape.grid for shape in media]
        depth = self.policy.temporal_patch_size
        seconds = [depth / shape.metadata.sampled_fps for shape in media if shape.metadata]
        position_ids = self.positions(input_ids, grids, media_types, seconds)
        no_patches = torch.empty((0, self.policy.patch_dim), dtype=torch.uint8)
        patches = torch.cat([no_patches, *(patches for patches, _ in loaded)])
        return Sample(input_ids, labels, position_ids, patches, grids, media_types, seconds)

    def token_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return 1 for tokens of images, 2 for tokens of videos, else 0, as int64."""
        is_image, is_video = input_ids == self.image_token_id, input_ids == self.video_token_id
        return is_image.long() + 2 * is_video.long()

    def positions(
        self, input_ids: torch.Tensor, grids: list, media_types: list, second_per_grid_ts: list
    ) -> torch.Tensor:
        """Return the M-RoPE positions (3, T) of a sample, by the model's own rule."""
        grids_of = {
            kind: torch.tensor([grid for grid, k in zip(grids, media_types) if k == kind])
            for kind in set(media_types)
        }
        position_ids, _ = self.get_rope_index(
            input_ids[None],
            self.token_types(input_ids)[None],
            image_grid_thw=grids_of.get("image"),
            video_grid_thw=grids_of.get("video"),
            # Qwen2.5-VL places frames by their time; the others take no notice.
            second_per_grid_ts=torch.tensor(second_per_grid_ts),
        )
        return position_ids[:, 0]

    def dummy(self) -> Sample:
        """Return the smallest black picture as a sample that trains nothing.

        It stands in every micro-batch, so that every parameter takes part in every forward pass:
        the gradients that it adds are exactly zero.
        """
        grid = self.policy.dummy_grid
        input_ids = torch.full((self.num_dummy_tokens,), self.image_token_id)
        labels = torch.full_like(input_ids, IGNORE)
        position_ids = self.positions(input_ids, [grid], ["image"], [])
        patches = torch.zeros((math.prod(grid), self.policy.patch_dim), dtype=torch.uint8)
        return Sample(input_ids, labels, position_ids, patches, [grid], ["image"], [])

    def _at_media(self, function, i: int, item: dict):
        try:
            return function(item, self.policy)
        except Exception as error:  # whatever a decoder throws: say which file it was
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"message {i}: {describe(item[item['type']])}: cannot be read as {item['type']}: "
                f"{reason}"
            ) from error


def find_file(path: str, folder: Path) -> str:
    """Return where a media path of a data file is: in the current folder, else in `folder`."""
    if scheme := re.match(r"(\w+)://", path.removeprefix("file://")):
        raise ValueError(f"{describe(path)}: {scheme[0]} is not read: use a file, or http(s)://")
    path = local_path(path)
    for candidate in dict.fromkeys((Path(path), folder / path)):
        if os.path.lexists(candidate):
            try:
                check_local_file(str(candidate))
            except ValueError as error:
                raise ValueError(f"{describe(candidate)}: {error}") from error
            return str(candidate)
    places = " nor ".join(describe(place) for place in (Path(path).absolute(), folder / path))
    hint = "correct the path, or put it there"
    if path.startswith("~"):
        hint = "~ is not read as a home folder: write the whole path"
    elif "\\" in path:
        hint = "folders are set apart by /, not by \\"
    raise ValueError(f"no such file: {places}: {hint}")
