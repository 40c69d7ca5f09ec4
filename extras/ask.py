"""Ask a model: `python sft.py ask MODEL ["question"]`.

    python sft.py ask runs/facts                               # a prompt to type at
    python sft.py ask runs/facts "What is the capital of France?"
    echo "What is the capital of France?" | python sft.py ask EleutherAI/gpt-neo-125m

Answers are printed while they are generated, by the engine that `test` uses (generation.py),
greedily and with the template that the checkpoint was trained with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from checkpoint import find_model
from config import DEFAULT_TEMPLATE, GenerateParams, UserError
from data import Encoder, Prompt
from device import Device, open_device
from extras.console import Console, visible
from extras.generation import Batching, Decoding, generate
from model import AnswerModel, check_ids, context_length, open_model, parameters_in

MAX_NEW_TOKENS = 256


def ask(name: str, question: str | None) -> int:
    """Answer one question, or without one those of stdin; returns the process's exit code.

    Raises:
        UserError: there is no such model, or a question does not fit into its context.
    """
    device = open_device()
    warn = Console().warn
    opened = open_model(find_model(name, warn), warn=warn)
    encoder = Encoder(opened.tokenizer, opened.template or DEFAULT_TEMPLATE)
    model = opened.model.eval()
    device.move_model(model)
    typed = question is None and sys.stdin.isatty()
    if typed:
        size = parameters_in(model.parameters())
        print(f"{opened.place}, {size:,} parameters, on {device.describe()}")
        print("Ctrl-C ends an answer, Ctrl-D or an empty line ends this.")
    try:
        for text in _questions(typed) if question is None else [question]:
            try:
                answer(model, encoder, device, text)
            except (KeyboardInterrupt, UserError) as error:
                if not typed:
                    raise
                print(f"error: {error}" if isinstance(error, UserError) else " [stopped]")
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


def answer(model: AnswerModel, encoder: Encoder, device: Device, question: str) -> None:
    """Print the answer to a question while it is generated.

    Raises:
        UserError: the question leaves no room for an answer in the model's context.
    """
    prompt = Prompt(1, question, "", encoder.prompts([question])[0])
    check_ids(model.model, encoder.tokenizer, max(prompt.input_ids, default=0), "the question")
    used, context = len(prompt.input_ids), context_length(model.model)
    room = MAX_NEW_TOKENS if context is None else min(MAX_NEW_TOKENS, context - used)
    if room < 1:
        raise UserError(
            f"the question has {used} tokens in its template and the model's context is "
            f"{context}; ask a shorter one"
        )
    shown = 0

    def show(_: Prompt, tokens: list[int], whole: bool = False) -> None:
        nonlocal shown
        text = encoder.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
        # Until its last byte has come, a character of several bytes is decoded as U+FFFD.
        if whole or not text.endswith("\ufffd"):
            print(visible(text[shown:], keep="\n\t"), end="", flush=True)
            shown = len(text)

    params = GenerateParams(max_new_tokens=room)
    decoding, batching = Decoding(params, seed=0), Batching(batch_size=1)
    (done,) = generate(model, [prompt], device, decoding, batching, on_token=show)
    show(prompt, done.tokens, whole=True)
    print("" if done.ended else " [...]")
