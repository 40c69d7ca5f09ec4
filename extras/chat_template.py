"""Conversations in a tokenizer's own chat template, with the assistant's words as the target.

`ChatEncoder` has the methods of `data.Encoder`; `Opened.encoder` chooses between the two.
"""

from __future__ import annotations

import functools
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from config import CHAT, UserError, first_line
from data import QUOTE, Conversation, Encoded, Encoder, Message, numbered

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


Span = tuple[int, int, bool]  # of a message: from where to where, and whether it is trained on


class ChatEncoder(Encoder):
    """Conversations in the tokenizer's own chat template.

    What a trained message adds is found by rendering prefixes: the text up to the message, with
    the words that make the model speak, has to begin the text with the message. Where a template
    breaks that, since it drops what was thought before, say, each trained message makes a sample
    of its own. A target ends with the control token that ends the turn.

    Raises:
        UserError: there is no chat template, or answers in it have no end.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, CHAT)
        self.name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(
                f"{self.name}: the tokenizer has no chat template, which conversations need; use "
                "an instruct model's, or for questions with one answer each write the prompt as a "
                "text with {question} in data.prompt_template"
            )
        self.chat_template: str = tokenizer.get_chat_template()
        self.ids_of = functools.lru_cache(1024)(lambda text: self.ids([text])[0])
        self.unquoted_token = re.compile(f"(?<!{QUOTE})(?:{self.control_token.pattern})")
        self.trailing = re.compile(rf"(?:{self.control_token.pattern}|\s+)$")
        self.end_token = ""
        # What ends a turn shows best where another one follows.
        pair = Conversation.of_pair(0, "a", "b")
        longer = pair._replace(messages=(*pair.messages, Message("user", "c")))
        found = self._spans(longer, ask=True) or self._spans(pair)
        if found is None:
            raise UserError(
                f"{self.name}: its chat template does not put an answer behind the words that ask "
                "for one, with a control token at the answer's end, so answers could not be "
                "learnt; correct the template, or write the prompt as a text with {question} in "
                "data.prompt_template"
            )
        text, ((start, end, _),) = found
        self.end_token = self.unquoted_token.findall(text, start, end)[-1]
        end_id = tokenizer.convert_tokens_to_ids(self.end_token)
        self.end_ids = list(dict.fromkeys([*self.end_ids, end_id]))

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Encoded]]:
        parts = [list(self._parts(conversation)) for conversation in conversations]
        ids = iter(self.ids([text for some in parts for _, text, _ in some]))
        return [[self._encoded(*part, next(ids)) for part in some] for some in parts]

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        found = []
        for conversation in conversations:
            asked = conversation.prompt
            spans = self._spans(asked, ask=True)
            found.append(
                spans or (self._render(asked.row, self._chat(asked), asked.tools, True), [])
            )
        ids = self.ids([text for text, _ in found])
        # Placed like a message, so that what stands before it is tokenised as in a sample.
        ends = [[*spans, (len(text), len(text), False)] for text, spans in found]
        return [self._place(text, e, i)[0] for (text, _), e, i in zip(found, ends, ids)]

    def as_chat_template(self) -> str | None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()}{self.chat_template}".encode()).hexdigest()

    def _chat(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages as a template gets them."""
        return [
            {"role": role, "content": self.quoted(text), **self._quoted_fields(fields)}
            for role, text, _, fields in conversation.messages
        ]

    def _quoted_fields(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._quoted_fields(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._quoted_fields(inner) for inner in value]
        return self.quoted(value) if isinstance(value, str) else value

    def _render(self, row: int, chat: list[Any], tools: Sequence[Any], ask: bool = False) -> str:
        """The text of messages; with `ask`, and the words that make the model speak next."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program, and fails as it likes
            raise UserError(
                f"{numbered([row])}: the chat template of {self.name} refuses "
                f"{' + '.join(message['role'] for message in chat)}: {first_line(error)}"
            ) from None
        return text

    def _spans(
        self, conversation: Conversation, ask: bool = False
    ) -> tuple[str, list[Span]] | None:
        """The text, and the places in it of what the assistant says.

        A message of whose text the longer conversation makes another one has no place; if it is to
        be trained on, the result is None.
        """
        row, messages, tools = conversation
        chat = self._chat(conversation)
        whole, spans = self._render(row, chat, tools, ask), []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            last = i == len(messages) - 1 and not ask
            try:
                prompt = self._render(row, chat[:i], tools, ask=True)
                said = whole if last else self._render(row, chat[: i + 1], tools)
            except UserError:  # a greeting before any question, say
                if message.trained:
                    raise
                continue
            while not whole.startswith(said):  # a further token may end a whole conversation
                shorter = self.trailing.sub("", said)
                said = shorter if shorter != said else ""
            begins = said.startswith(prompt)
            ends = list(self.unquoted_token.finditer(said, len(prompt))) if begins else []
            if ends:
                end = [match for match in ends if match[0] == self.end_token] or ends
                spans.append((len(prompt), end[-1].end(), message.trained))
            elif message.trained:
                return None
        if GENERATION.search(self.chat_template) and not ask:
            self._check_marks(conversation, chat, spans)
        return whole, spans

    def _check_marks(self, conversation: Conversation, chat: list[Any], spans: list[Span]) -> None:
        """Raise a UserError if the template itself marks something else as what the model says."""
        texts, marks = render_jinja_template(
            [chat],
            tools=list(conversation.tools) or None,
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marked = {self._said(texts[0][start:end]) for start, end in marks[0]}
        for start, end, _ in spans:
            if (said := self._said(texts[0][start:end])) not in marked:
                raise UserError(
                    f"{numbered([conversation.row])}: the chat template of {self.name} marks "
                    f"{sorted(marked)!r} by {{% generation %}}, and asked for an answer it would "
                    f"begin where {said!r} begins; correct the marks, or remove them"
                )

    def _said(self, text: str) -> str:
        """A turn's text without white space around it and without what ends it."""
        while (shorter := self.trailing.sub("", text)) != text:
            text = shorter
        return text.strip()

    def _parts(self, conversation: Conversation) -> Iterator[tuple[Conversation, str, list[Span]]]:
        """The samples that a conversation makes: nearly always one, it as a whole."""
        found = self._spans(conversation)
        if found is not None:
            yield conversation, *found
            return
        messages = conversation.messages
        for i in (i for i, message in enumerate(messages) if message.trained):
            before = [message._replace(trained=False) for message in messages[:i]]
            alone = conversation._replace(messages=(*before, messages[i]))
            found = self._spans(alone)
            if found is None:
                raise UserError(
                    f"{numbered([conversation.row])}: in the chat template of {self.name} message "
                    f"{i + 1} does not begin with the words that make the model speak, so it would "
                    "not be asked for what it learnt"
                )
            yield alone, *found

    def _encoded(
        self, conversation: Conversation, text: str, spans: list[Span], ids: list[int]
    ) -> Encoded:
        input_ids, places = self._place(text, spans, ids)
        target_mask = [0] * len(input_ids)
        targets = [place for place in places if place[2]]
        for first, stop, _ in targets:
            target_mask[first:stop] = [1] * (stop - first)
        end = targets[-1][1] if targets else None  # what follows would be learnt by no one
        return Encoded(conversation, input_ids[:end], target_mask[:end])

    def _place(
        self, text: str, spans: list[Span], ids: list[int], inside: bool = False
    ) -> tuple[list[int], list[Span]]:
        """The ids of a text, and the spans of its characters as spans of the ids.

        Control tokens part a text, so that only what follows the last one before a span has to be
        tokenised again. If that gives other ids than when more text follows, the two are tokenised
        apart, as they will be when the model is asked.

        Args:
            ids: of the whole text in one piece.
            inside: another text stands before this one.
        """
        controls = [match.span() for match in self.unquoted_token.finditer(text)]
        places = [i for i, token in enumerate(ids) if token in self.control_ids]
        if len(places) != len(controls):  # unknown characters, say, have the id of a control token
            controls, places = [], []

        def count(end: int) -> int | None:
            """How many ids text[:end] has, if it has the same."""
            before = bisect_right(controls, end, key=lambda span: span[1]) - 1
            first, since = (places[before], controls[before][0]) if before >= 0 else (0, 0)
            of = self._behind if inside and before < 0 else self.ids_of
            tail = of(text[since:end])
            return first + len(tail) if ids[first : first + len(tail)] == tail else None

        placed: list[Span] = []
        for n, (start, end, trained) in enumerate(spans):
            first = count(start)
            stop = count(end)
            if first is None or stop is None:
                head = self._behind(text[:start]) if inside else self.ids_of(text[:start])
                later = [(a - start, b - start, which) for a, b, which in spans[n:]]
                rest = self._behind(text[start:])
                rest, others = self._place(text[start:], later, rest, inside=True)
                moved = [(a + len(head), b + len(head), which) for a, b, which in others]
                return head + rest, placed + moved
            placed.append((first, stop, trained))
        return ids, placed

    def _behind(self, text: str) -> list[int]:
        return self.continuing([text], control=True)[0]
