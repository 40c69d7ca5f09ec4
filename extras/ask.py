"""Ask a model: `python sft.py ask MODEL ["question"]`.

    python sft.py ask runs/facts                               # a prompt to type at
    python sft.py ask runs/facts "What is the capital of France?"
    python sft.py ask runs/chat --system "Be short." --temperature 0.7
    echo "What is the capital of France?" | python sft.py ask EleutherAI/gpt-neo-125m

At a prompt, a model with a chat template remembers what was said before; with a template of one
question every question stands alone, and so do the lines of a pipe. Answers are printed while they
are generated, by the engine that `test` uses (generation.py), greedily unless a temperature is
given, in the template that the checkpoint was trained with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from checkpoint import find_model
from config import GenerateParams, UserError
from data import Conversation, Encoder, Message, Prompt, shorten
from device import Device, open_device
from extras.chat_template import ChatEncoder
from extras.console import Console, visible
from extras.generation import Batching, Decoding, generate
from extras.model_checks import check_ids, context_length
from model import AnswerModel, open_model, parameters_in

MAX_NEW_TOKENS = 256
NOTHING = (
    "(no answer: the first thing that the model said ends one. It may be used to another prompt "
    "template, or not be trained to answer yet)"
)


@dataclass
class Talk:
    """A conversation with a model; `messages` are those so far, without the system message."""

    model: AnswerModel
    encoder: Encoder
    device: Device
    system: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        return isinstance(self.encoder, ChatEncoder)

    def ask(self, question: str) -> str:
        """Print the answer to a question while it is generated, and return it.

        Raises:
            UserError: the question leaves no room for an answer in the model's context.
        """
        prompt = self._prompt(question)
        used, context = len(prompt.input_ids), context_length(self.model.model)
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - used)
        if room < 1:
            raise UserError(
                f"the question has {used} tokens in its template and the model's context is "
                f"{context}; ask a shorter one"
            )
        shown = 0

        def decoded(tokens: list[int]) -> str:
            text: str = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
            return text.lstrip()

        def show(_: Prompt, tokens: list[int], whole: bool = False) -> None:
            nonlocal shown
            text = decoded(tokens)
            # Until its last byte has come, a character of several bytes is decoded as U+FFFD.
            if whole or not text.endswith("\ufffd"):
                print(visible(text[shown:], keep="\n\t"), end="", flush=True)
                shown = len(text)

        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {}
        params = GenerateParams.model_validate({"max_new_tokens": room, **sampling})
        decoding = Decoding(params, seed=len(self.messages))
        batching = Batching(batch_size=1)
        (done,) = generate(self.model, [prompt], self.device, decoding, batching, on_token=show)
        show(prompt, done.tokens, whole=True)
        answer = decoded(done.tokens)
        print("" if done.ended else " [...]")
        if self.remembers:
            said = Message("user", question), Message("assistant", answer.strip())
            self.messages += said
        if not answer.strip():
            print(NOTHING, file=sys.stderr)
        return answer

    def _prompt(self, question: str) -> Prompt:
        """The question behind what was said before, as much of it as leaves room for an answer."""
        messages = [*self.messages, Message("user", question)]
        if self.system and self.remembers:
            messages.insert(0, Message("system", self.system))
        asked = Conversation(1, tuple(messages))
        ids, context = self.encoder.prompts([asked])[0], context_length(self.model.model)
        if self.messages and context is not None:
            room = context - min(self.max_new_tokens, context // 2)
            if len(ids) > room:
                shorter = shorten(self.encoder, asked, room)
                asked = asked if shorter.question != question else shorter
                ids = self.encoder.prompts([asked])[0]
        check_ids(self.model.model, self.encoder.tokenizer, max(ids, default=0), "the question")
        return Prompt(asked, ids)

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; returns what to print."""
        word, _, text = line.partition(" ")
        if not self.remembers:
            return "each question stands alone in this model's template; there is nothing to set"
        if word == "/system":
            self.system, self.messages = text.strip() or None, []
            return "a new conversation, " + ("with that system message" if text else "without one")
        if word == "/reset":
            self.messages = []
            return "a new conversation"
        return "commands: /reset (forget what was said), /system TEXT (and begin with that)"


def ask(
    name: str,
    question: str | None,
    system: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
) -> int:
    """Answer one question, or without one those of stdin; returns the process's exit code.

    Raises:
        UserError: there is no such model, or a question does not fit into its context.
    """
    device = open_device()
    warn = Console().warn
    opened = open_model(find_model(name, warn), warn=warn)
    encoder = opened.encoder(None, conversations=bool(opened.tokenizer.chat_template))
    model = opened.model.eval()
    device.move_model(model)
    system = opened.details.get("system") if system is None else system
    talk = Talk(model, encoder, device, system, max_new_tokens, temperature)
    if talk.system and not talk.remembers:
        raise UserError(f"--system: {opened.place} has no chat template to put it in")
    typed = question is None and sys.stdin.isatty()
    if typed:
        size = parameters_in(model.parameters())
        print(f"{opened.place}, {size:,} parameters, on {device.describe()}")
        alone = "Each question stands alone. "
        memory = "It remembers what was said: /reset forgets it, /system TEXT begins with TEXT. "
        print(memory if talk.remembers else alone, end="")
        print("Ctrl-C ends an answer, Ctrl-D or an empty line ends this.")
    try:
        for text in _questions(typed) if question is None else [question]:
            if typed and text.startswith("/"):
                print(talk.command(text))
                continue
            try:
                talk.ask(text)
            except (KeyboardInterrupt, UserError) as error:
                if not typed:
                    raise
                print(f"error: {error}" if isinstance(error, UserError) else " [stopped]")
            if not typed:
                talk.messages.clear()
    except BrokenPipeError:  # whoever read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _questions(typed: bool) -> Iterator[str]:
    """Lines of stdin until it ends; at a prompt also until Ctrl-C or an empty line."""
    if not typed:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401  (gives input() line editing and a history)

    try:
        while text := input("> ").strip():
            yield text
    except (EOFError, KeyboardInterrupt):
        print()
