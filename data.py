"""Data: conversations -> token ids and target masks -> the order of steps -> batches.

    source = DataSource.open("data/facts.json")
    samples = prepare_train(source.conversations("train"), encoder, max_length=128)
    order = epoch_order(len(samples), samples_per_step=16, seed=1, epoch=0, lengths=samples.lengths)
    batch = collate(samples, order[:16])

A question/answer pair is a conversation of two messages. `Encoder.encode` turns a conversation into
token ids and a mask of those that are trained on; everything after it knows only these two, and
training, validation, `test` and `ask` all get their prompts from it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from config import DEFAULT_TEMPLATE, TrainData, UserError

if TYPE_CHECKING:
    from extras.formats import DataSource

IGNORE = -100  # the label of a position that is not trained on (torch's cross_entropy default)
POOL = 512  # samples that are sorted by length together; see epoch_order
CHUNK = 1000  # conversations tokenised at a time
NEXT_WORD = re.compile(r"\s*\S*")
LOOK_AHEAD = 24  # characters, longer than nearly every word; see cut_question
SHOWN_ROWS = 5
# Around a control token that is plain text: characters that Unicode keeps for such inner use.
QUOTE, UNQUOTE = "\ufdd0", "\ufdd1"
QUOTED = re.compile(f"{QUOTE}(.*?){UNQUOTE}", re.DOTALL)
INPUT_IDS, TARGET_MASK = "input_ids.bin", "target_mask.bin"  # files of `prepare_train`


# ------------------------------------------------------------------------------ conversations


NOTHING: Mapping[str, Any] = {}


class Message(NamedTuple):
    """What one party says.

    role: "system", "user", "assistant" or "tool". trained: the model learns to say it. fields: what
    a chat template may use besides, such as `tool_calls`, `name` or `reasoning_content`.
    """

    role: str
    text: str
    trained: bool = False
    fields: Mapping[str, Any] = NOTHING


class Conversation(NamedTuple):
    """Messages in their order, and the row of the data file that they come from, from 1.

    tools: JSON schemas of the functions that the model may call, for its chat template.
    """

    row: int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of_pair(cls, row: int, question: str, answer: str | None = None) -> Conversation:
        """A question, and its answer unless the model is to give it."""
        messages = (Message("user", question), Message("assistant", answer or "", trained=True))
        return cls(row, messages[: 1 if answer is None else 2])

    @property
    def answer_index(self) -> int:
        """The index of the last trained message; how many messages there are if none is."""
        trained = [i for i, message in enumerate(self.messages) if message.trained]
        return trained[-1] if trained else len(self.messages)

    @property
    def prompt(self) -> Conversation:
        """What stands before the last trained message, with nothing in it to train on."""
        before = self.messages[: self.answer_index]
        return self._replace(messages=tuple(message._replace(trained=False) for message in before))

    @property
    def question(self) -> str:
        """What the user said last before the last trained message."""
        said = [message.text for message in self.prompt.messages if message.role == "user"]
        return said[-1] if said else ""

    def asking(self, question: str) -> Conversation:
        """The same conversation with another `question`."""
        users = [i for i, m in enumerate(self.messages[: self.answer_index]) if m.role == "user"]
        if not users:
            return self
        messages = list(self.messages)
        messages[users[-1]] = messages[users[-1]]._replace(text=question)
        return self._replace(messages=tuple(messages))

    @property
    def answer(self) -> str | None:
        """The last trained message's text; None if it is still to be given."""
        rest = self.messages[self.answer_index :]
        return rest[0].text if rest else None


def numbered(rows: Sequence[int]) -> str:
    """Row numbers for a message: the first few and how many more."""
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    more = len(rows) - SHOWN_ROWS
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")


# ----------------------------------------------------------------------------------- encoding


class Encoded(NamedTuple):
    """A conversation as a model sees it, up to the last token that is trained on.

    target_mask: 1 for each of `input_ids` that is trained on, 0 for each other one.
    """

    conversation: Conversation
    input_ids: list[int]
    target_mask: list[int]

    @property
    def prompt_length(self) -> int:
        """How many ids stand before the last run of targets, which ends the sample."""
        return len(self.target_mask) - self.target_mask[::-1].index(0)


class Encoder:
    """Conversations as token ids and target masks; the template is a text with {question}.

    The prompt is the template with the question in it, behind the tokens that the tokenizer puts
    in front of a text (BOS, or nothing) and without those that it puts behind. The target is one
    space, the answer and one EOS; there is no space where the template or the answer has one of its
    own. The two are tokenised separately, so that the ids of a prompt are the beginning of the ids
    of a sample.

    A control token is one because the template says so: "<|endoftext|>" inside a message is text
    like any other.

    Raises:
        UserError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any, template: str = DEFAULT_TEMPLATE) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so answers could "
                "never end; set eos_token in its tokenizer_config.json"
            )
        self.tokenizer, self.template = tokenizer, template
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        control = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self.control_token = re.compile("|".join(map(re.escape, control)))
        self.control_ids = set(tokenizer.convert_tokens_to_ids(control))
        (plain,), whole = self.plain_ids(["a"]), tokenizer("a")["input_ids"]
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.prefix: list[int] = whole[:start]
        # SentencePiece puts a space in front of a text, which is none inside of one.
        self.lead, after = self.plain_ids(["\n", "\na"])
        self.adds_space = after != self.lead + plain
        self.end_ids: list[int] = [tokenizer.eos_token_id]
        control_at_end = re.search(f"({self.control_token.pattern})$", template)
        self.space = "" if control_at_end or template[-1:].isspace() else " "

    def _tokenize(self, texts: list[str], *, control: bool = True) -> list[list[int]]:
        """The ids of whole texts; with `control`, a control token's name stands for the token."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(texts, split_special_tokens=not control, **options)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def plain_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which no control token counts."""
        return self._tokenize(texts, control=False)

    def quoted(self, text: str) -> str:
        """The text with a mark around each control token in it, which `ids` then takes as text."""
        return self.control_token.sub(lambda match: f"{QUOTE}{match[0]}{UNQUOTE}", text)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which control tokens count, except where they are `quoted`."""
        plain = [text for text in texts if QUOTE not in text]
        found = iter(self._tokenize(plain))
        return [self._unquote(text) if QUOTE in text else next(found) for text in texts]

    def _unquote(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(QUOTED.split(text)):
            ids += self._tokenize([part], control=i % 2 == 0)[0] if part else []
        return ids

    def continuing(self, texts: list[str], *, control: bool) -> list[list[int]]:
        """The ids of texts that stand behind others, without a space of the tokenizer's.

        control: control tokens count, except where they are quoted.
        """
        ids_of, size = self.ids if control else self.plain_ids, len(self.lead)
        if not self.adds_space:
            return ids_of(texts)
        both = zip(texts, ids_of([f"\n{text}" for text in texts]))
        return [i[size:] if i[:size] == self.lead else ids_of([t])[0] for t, i in both]

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Encoded]]:
        """Each conversation as samples, nearly always one; without an answer, as its prompt.

        Raises:
            UserError: a conversation that the template has no place for; the message has its row.
        """
        prompts = self.prompts(conversations)
        answers = [c.answer for c in conversations if c.answer is not None]
        spaces = ("" if a[:1].isspace() else self.space for a in answers)
        targets = iter(self.continuing([f"{s}{a}" for s, a in zip(spaces, answers)], control=False))
        encoded = []
        for conversation, prompt in zip(conversations, prompts):
            target: list[int] = []
            if conversation.answer is not None:
                target = [*next(targets), self.tokenizer.eos_token_id]
            target_mask = [0] * len(prompt) + [1] * len(target)
            target_mask[:1] = [0]  # no token precedes the first one to predict it
            encoded.append([Encoded(conversation, prompt + target, target_mask)])
        return encoded

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """The ids that a model gets to say the last trained message of each conversation."""
        questions = []
        for row, messages, _ in conversations:
            if [m.role for m in messages] not in (["user"], ["user", "assistant"]):
                raise UserError(
                    f"{numbered([row])}: found {' + '.join(m.role for m in messages)}; this prompt "
                    "template takes one question and one answer. data.prompt_template: chat takes "
                    "conversations, if the model's tokenizer has a chat template"
                )
            questions.append(messages[0].text)
        if self.control_token.search(self.template):
            questions = [self.quoted(question) for question in questions]
            found = self.ids([self.template.replace("{question}", q) for q in questions])
        else:
            filled = [self.template.replace("{question}", q) for q in questions]
            found = self.plain_ids(filled)
        # A template that is written with the BOS token has the prefix already.
        size = len(self.prefix)
        return [ids if ids[:size] == self.prefix else self.prefix + ids for ids in found]

    def as_chat_template(self) -> str | None:
        """This template in Jinja, for whoever asks the trained model without us.

        `apply_chat_template` of one question then gives the very ids of `prompts`. None if the
        tokenizer's own template is the one that is trained with.
        """
        before, _, after = self.template.partition("{question}")
        prefix = "".join(self.tokenizer.convert_ids_to_tokens(self.prefix))
        before = before if before.startswith(prefix) else prefix + before
        texts = (before, after, self.space, self.tokenizer.eos_token)
        start, end, space, eos = map(json.dumps, texts)
        return (
            "{%- if messages[0]['role'] != 'user' or messages | length > 2 %}"
            "{{ raise_exception('This model was trained on one question with one answer.') }}"
            f"{{%- endif %}}{{{{- {start} + messages[0]['content'] + {end} }}}}"
            "{%- if messages | length == 2 %}"
            f"{{{{- {space} + messages[1]['content'] + {eos} }}}}{{%- endif %}}"
        )

    def fingerprint(self) -> str:
        """SHA-256 over all that the ids of a text depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        parts = [vocabulary, self.template, str(self.prefix), str(self.tokenizer.eos_token_id)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def shorten(encoder: Encoder, conversation: Conversation, room: int) -> Conversation:
    """The conversation without its oldest turns, as many as it takes, then with a cut question.

    A turn is a user's message and what follows it; system messages in front stay, and so does the
    last turn. room: how many ids the prompt of the last trained message may have.
    """
    messages, last = conversation.messages, conversation.answer_index
    turns = [i for i, m in enumerate(messages[:last]) if m.role == "user"]
    begins = turns[0] if turns else 0
    candidates = [conversation._replace(messages=messages[:begins] + messages[i:]) for i in turns]

    def fits(shorter: Conversation) -> bool:
        return len(encoder.prompts([shorter])[0]) <= room

    # The fewer turns, the shorter: the first one that fits is found by bisection.
    found = bisect_left(candidates, True, key=fits)
    if found < len(candidates):
        return candidates[found]
    return cut_question(encoder, candidates[-1] if candidates else conversation, room)


def cut_question(encoder: Encoder, conversation: Conversation, room: int) -> Conversation:
    """The question, shortened from its end until the prompt has at most `room` ids.

    The template's words stay whole; with no room for them either, the question is empty and the
    prompt longer than `room`. Bisection over characters, then a look further on: a whole word
    often is one token where a part of it is three, so that bisection alone stops within a word
    that fits.
    """
    question = conversation.question

    def fits(*ends: int) -> list[bool]:
        shorter = [conversation.asking(question[:end]) for end in ends]
        return [len(ids) <= room for ids in encoder.prompts(shorter)]

    low, high = 0, len(question)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle)[0] else (low, middle - 1)
    while low < len(question):
        word = NEXT_WORD.match(question, low, low + LOOK_AHEAD)
        ends = range(low + 1, (word.end() if word else low) + 1)
        fitting = [end for end, fit in zip(ends, fits(*ends)) if fit]
        if not fitting:
            break
        low = fitting[-1]
    return conversation.asking(question[:low])


@dataclass
class Counts:
    """What truncation did; row numbers count from 1, and only the first few are kept."""

    kept: int = 0
    turns_dropped: int = 0
    question_cut: int = 0
    answer_cut: int = 0
    dropped: int = 0
    split: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, row: int) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        rows = self.rows.setdefault(kind, [])
        if len(rows) < SHOWN_ROWS:
            rows.append(row)

    def add_cuts(self, whole: Conversation, shorter: Conversation) -> None:
        """Count what `shorten` took away."""
        if len(shorter.messages) < len(whole.messages):
            self.add("turns_dropped", whole.row)
        if shorter.question != whole.question:
            self.add("question_cut", whole.row)

    def describe(self) -> str:
        parts = [f"{self.kept:,} kept"]
        kinds = ("turns_dropped", "question_cut", "answer_cut", "dropped", "split")
        for kind in kinds if self.split or self.turns_dropped else kinds[1:4]:
            count, rows = getattr(self, kind), self.rows.get(kind, [])
            where = f" ({numbered(rows)}{' ...' if count > len(rows) else ''})" if count else ""
            parts.append(f"{count:,} {kind.replace('_', ' ')}{where}")
        return ", ".join(parts)


@dataclass
class Samples:
    """Encoded conversations in flat arrays, which may be mapped from a file.

    input_ids: int32 [all tokens]; target_mask: uint8 [all tokens], 1 where a token is trained on.
    Sample i is lengths[i] tokens from starts[i] on, target_lengths[i] of them targets, and comes
    from row rows[i] of the data file, counted from 1; int64 [N] and int32 [N].
    """

    input_ids: np.ndarray
    target_mask: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    target_lengths: np.ndarray
    rows: np.ndarray
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def of(
        cls, input_ids: np.ndarray, target_mask: np.ndarray, index: np.ndarray, counts: Counts
    ) -> Samples:
        """index: int32 [N, 3], of each sample its length, its number of targets and its row."""
        lengths = index[:, 0].astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        return cls(input_ids, target_mask, starts, lengths, index[:, 1], index[:, 2], counts)

    def __len__(self) -> int:
        return len(self.starts)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids [T], target_mask [T]) of sample i."""
        place = slice(self.starts[i], self.starts[i] + self.lengths[i])
        return self.input_ids[place], self.target_mask[place]

    def prompt(self, i: int) -> list[int]:
        """The ids of sample i up to its last answer, for a model to answer."""
        input_ids, target_mask = self.sample(i)
        begins = np.flatnonzero(np.diff(target_mask, prepend=0) == 1)
        return input_ids[: begins[-1]].tolist()

    def subset(self, indices: np.ndarray) -> Samples:
        return replace(
            self,
            starts=self.starts[indices],
            lengths=self.lengths[indices],
            target_lengths=self.target_lengths[indices],
            rows=self.rows[indices],
        )


def prepare_train(
    conversations: Iterable[Conversation],
    encoder: Encoder,
    max_length: int,
    truncate_prompt: bool = True,
    directory: Path | None = None,
) -> Samples:
    """Encode conversations into samples of at most `max_length` ids.

    Args:
        truncate_prompt: true drops the oldest turns of a sample that is too long, then shortens
            its question, and its answer only if that does not fit beside an empty question (it
            then has no end to learn); false leaves all that alone and drops the sample's tail. A
            sample without any target left is dropped. All of it is counted in `Samples.counts`.
        directory: where to write the arrays; None keeps them in memory.
    """
    counts = Counts()
    all_ids = _FlatArray(np.int32, directory and directory / INPUT_IDS)
    all_masks = _FlatArray(np.uint8, directory and directory / TARGET_MASK)
    index = [np.zeros((0, 3), dtype=np.int32)]
    for chunk in _chunks(conversations, CHUNK):
        flat_ids: list[int] = []
        flat_mask: list[int] = []
        sizes: list[tuple[int, int, int]] = []
        for parts in encoder.encode(chunk):
            if len(parts) > 1:
                counts.add("split", parts[0].conversation.row)
            for part in parts:
                ids, mask = _fit(encoder, part, max_length, truncate_prompt, counts)
                if ids:
                    flat_ids += ids
                    flat_mask += mask
                    sizes.append((len(ids), sum(mask), part.conversation.row))
        all_ids.extend(flat_ids)
        all_masks.extend(flat_mask)
        index.append(np.array(sizes, dtype=np.int32).reshape(-1, 3))
    return Samples.of(all_ids.finish(), all_masks.finish(), np.concatenate(index), counts)


def _fit(
    encoder: Encoder, whole: Encoded, max_length: int, truncate_prompt: bool, counts: Counts
) -> tuple[list[int], list[int]]:
    """At most `max_length` ids and their mask, none without a target; `counts` what it cost."""
    shorter, ids, mask = whole
    if len(ids) > max_length and truncate_prompt:
        # As many as the prompt may have beside the last answer.
        room = max_length - (len(ids) - whole.prompt_length)
        shorter, ids, mask = encoder.encode([shorten(encoder, shorter, room)])[0][-1]
    targets, ids, mask = sum(mask), ids[:max_length], mask[:max_length]
    if not any(mask):
        counts.add("dropped", shorter.row)
        return [], []
    counts.kept += 1
    counts.add_cuts(whole.conversation, shorter)
    if sum(mask) < targets:
        counts.add("answer_cut", shorter.row)
    return ids, mask


class _FlatArray:
    """An array that grows, in memory or in a file, which is mapped at the end."""

    def __init__(self, dtype: type[np.generic], path: Path | None) -> None:
        self.dtype, self.path = dtype, path
        self.handle = path.open("wb") if path else None
        self.parts = [np.zeros(0, dtype)]

    def extend(self, values: list[int]) -> None:
        array = np.array(values, dtype=self.dtype)
        if self.handle:
            array.tofile(self.handle)
        else:
            self.parts.append(array)

    def finish(self) -> np.ndarray:
        if self.handle is None or self.path is None:
            return np.concatenate(self.parts)
        self.handle.close()
        return map_array(self.path, self.dtype)


def map_array(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """A file of numbers as an array, read where it is looked at."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _chunks(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


@dataclass(frozen=True)
class Splits:
    """What is trained on and validated on, and all that the data's `train` split holds.

    val_name: of the split that `val` comes from. overlap: see `formats.overlap`.
    """

    train: Samples
    val: Samples
    whole: Samples
    val_name: str
    overlap: dict[str, int]


def load_splits(
    source: DataSource, encoder: Encoder, data: TrainData, overfit_batches: float, seed: int
) -> Splits:
    """The samples of a training, as the keys of its configuration say.

    Raises:
        UserError: rows that cannot be used, or a split without a target to learn.
    """
    from extras.token_cache import cached_samples

    whole, common = cached_samples(source, "train", encoder, data.max_length, data.truncate_prompt)
    train, val_name = whole, "train"
    if overfit_batches:
        share = not isinstance(overfit_batches, int)
        size = overfit_batches * (len(whole) if share else data.batch_size)
        train = val = whole.subset(np.arange(min(len(whole), max(1, math.ceil(size)))))
    elif source.has("val"):
        val_name = "val"
        val, _ = cached_samples(source, "val", encoder, data.max_length, data.truncate_prompt)
    elif len(whole):
        train, val = hold_out(whole, data.val_fraction, seed)
    else:
        val = whole
    for name, samples in (("train", train), (val_name, val)):
        if int(samples.target_lengths.sum()) == 0:
            raise UserError(
                f"data: the split {name!r} has no target token to learn: "
                f"{samples.counts.describe()}; raise data.max_length ({data.max_length})"
            )
    return Splits(train, val, whole, val_name, common)


def hold_out(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Split samples into (train, val), at random from `seed`, both in file order."""
    if len(samples) < 2:
        raise UserError(
            "data: one training sample is too few to hold some out for validation; "
            "add rows, or a 'val' split"
        )
    count = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
    chosen = np.random.default_rng([seed, 0x56414C]).permutation(len(samples))[:count]
    held = np.zeros(len(samples), dtype=bool)
    held[chosen] = True
    return samples.subset(np.flatnonzero(~held)), samples.subset(np.flatnonzero(held))


# ---------------------------------------------------------------------------------- batches


def by_length(lengths: np.ndarray) -> np.ndarray:
    """The order from the shortest to the longest; those of one length stay in their order."""
    return np.argsort(lengths, kind="stable")


def epoch_order(
    count: int,
    samples_per_step: int,
    seed: int,
    epoch: int,
    lengths: np.ndarray | None = None,
    shuffle: bool = True,
) -> np.ndarray:
    """The order of samples in an epoch; step k trains on order[k * S : (k + 1) * S].

    A pure function of its arguments, so a resumed run finds its place without replaying anything.

    With `lengths`, the shuffled samples are taken in pools of at least POOL; each pool is sorted
    by length, cut into steps, and the steps of the pool are shuffled again. Which samples may meet
    in a step is then limited to those of like length in the same random pool, while the order of
    steps does not depend on length. Nothing depends on how a step is split into micro-batches
    and ranks. A step of at least POOL samples is an unrestricted random draw.

    Returns:
        int64 [count], a permutation.
    """
    if not shuffle:
        return np.arange(count)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    if lengths is None:
        return order
    # The samples of the last, shorter step are a random draw, not the longest of the last pool.
    whole = count - count % samples_per_step
    pool = -(-POOL // samples_per_step) * samples_per_step
    parts = []
    for start in range(0, whole, pool):
        members = order[start : min(start + pool, whole)]
        members = members[by_length(lengths[members])]
        steps = members.reshape(-1, samples_per_step)
        parts.append(steps[rng.permutation(len(steps))].ravel())
    return np.concatenate([*parts, order[whole:]])


def micro_batches(
    rows: np.ndarray, batch_size: int, lengths: np.ndarray, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """Split one step's samples into this rank's micro-batches, samples of like length together.

    Every rank gets the same number of micro-batches; in a short last step some may be empty.
    """
    rows = rows[by_length(lengths[rows])]
    round_size = batch_size * world_size
    rounds = [rows[i : i + round_size] for i in range(0, len(rows), round_size)]
    return [members[rank::world_size] for members in rounds]


@dataclass
class Batch:
    """A micro-batch: right-padded rows, or all samples behind each other in one row.

    input_ids: int64 [B, T]; packed, it is [1, T] and `lengths` has the samples' lengths, so that
    each is attended to alone. target_positions: int64 [M], indices into the B * T positions whose
    *next* token is a target. target_ids: int64 [M], those next tokens; IGNORE fills up static
    shapes. rows: the samples' indices, on the host. prefix: cached outputs of frozen blocks,
    [B, T, C], see extras/frozen_prefix.py.

    No attention mask: a causal model cannot look at padding that comes after.
    """

    input_ids: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    rows: np.ndarray
    prefix: torch.Tensor | None = None
    lengths: list[int] | None = None


def collate(
    samples: Samples,
    rows: np.ndarray,
    static_shape: tuple[int, int] | None = None,
    packed: bool = False,
) -> Batch:
    """Gather samples into a `Batch`.

    Args:
        packed: without any padding, for a model that can tell the samples apart.
        static_shape: (B, T) to pad to, for devices that compile for each shape.
    """
    parts = [samples.sample(int(i)) for i in rows]
    lengths = [len(ids) for ids, _ in parts] or [1]
    if packed:
        height, width = 1, sum(lengths)
        starts = np.cumsum([0, *lengths])
    else:
        height, width = static_shape or (len(lengths), max(lengths))
        starts = np.arange(height) * width
    input_ids = np.zeros(height * width, dtype=np.int64)  # the id of padding has no effect
    positions: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    targets: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for start, (ids, mask) in zip(starts, parts):
        input_ids[start : start + len(ids)] = ids
        chosen = np.flatnonzero(mask)
        positions.append(chosen - 1 + start)  # position t predicts token t + 1
        targets.append(ids[chosen])
    if static_shape:
        missing = height * width - sum(map(len, positions))
        positions.append(np.zeros(missing, dtype=np.int64))
        targets.append(np.full(missing, IGNORE))
    return Batch(
        torch.from_numpy(input_ids.reshape(height, width)),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(targets)),
        np.asarray(rows),
        lengths=lengths if packed else None,
    )


# -------------------------------------------------------------------------------- inference


@dataclass
class Prompt:
    """What a model is to answer; the conversation's last trained message is the reference."""

    conversation: Conversation
    input_ids: list[int]

    @property
    def row(self) -> int:
        return self.conversation.row

    @property
    def question(self) -> str:
        return self.conversation.question

    @property
    def reference(self) -> str:
        return self.conversation.answer or ""


def prepare_inference(
    conversations: Iterable[Conversation],
    encoder: Encoder,
    max_prompt_length: int,
    truncate_prompt: bool = True,
) -> tuple[list[Prompt], Counts]:
    """Encode what stands before the last answers exactly as `prepare_train` does.

    With `truncate_prompt`, a prompt that is too long loses its oldest turns, then the end of its
    question, until it has at most `max_prompt_length` ids; otherwise it is left whole.
    """
    prompts: list[Prompt] = []
    counts = Counts()
    for chunk in _chunks(conversations, CHUNK):
        for conversation, ids in zip(chunk, encoder.prompts(chunk)):
            if truncate_prompt and len(ids) > max_prompt_length:
                shorter = shorten(encoder, conversation, max_prompt_length)
                ids = encoder.prompts([shorter])[0]
                counts.add_cuts(conversation, shorter)
            counts.kept += 1
            prompts.append(Prompt(conversation, ids))
    return prompts, counts


def validation_prompts(
    samples: Samples, count: int, source: DataSource, split: str
) -> list[Prompt]:
    """What the first `count` samples answer last, with the very ids that training sees."""
    last = {int(row): i for i, row in enumerate(samples.rows)}  # of a row that makes several
    wanted = set(samples.rows[:count].tolist())
    return [
        Prompt(conversation, samples.prompt(last[conversation.row]))
        for conversation in source.conversations(split)
        if conversation.row in wanted
    ]


def pad_prompts(
    prompts: Sequence[list[int]], side: str, length: int | None = None
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], of prompts padded on one side.

    T is the longest prompt's length, or `length` if that is more.
    """
    width = max([length or 0, *map(len, prompts)])
    input_ids = torch.zeros((len(prompts), width), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(prompts):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[b, place] = torch.tensor(ids, dtype=torch.long)
        attention_mask[b, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
