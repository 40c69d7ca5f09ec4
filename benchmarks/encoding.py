"""What conversations cost beside pairs of as many tokens: CPU seconds a token, as a ratio.

    python benchmarks/encoding.py --data ../shared/data/gsm8k.json

The rows of a file of pairs are encoded by the template with {question}, then through ChatML as
conversations of one, two and eight turns. Best of three passes, in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANY_LENGTH = 10**6


def cost(encoder: Any, conversations: list[Any]) -> float:
    """CPU seconds a token."""
    from data import prepare_train

    costs = []
    for _ in range(3):
        began = time.process_time()
        samples = prepare_train(conversations, encoder, ANY_LENGTH)
        costs.append((time.process_time() - began) / int(samples.lengths.sum()))
    return min(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a file of pairs with a split `train`")
    parser.add_argument("--rows", type=int, default=4000)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tokenizers import AddedToken

    from data import Conversation, Encoder
    from extras.chat_template import ChatEncoder
    from extras.formats import DataSource
    from model import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "data" / "tiny-gpt-neo"))
    names = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.chat_template = CHATML
    pairs = list(DataSource.open(arguments.data).conversations("train"))[: arguments.rows]
    plain = cost(Encoder(tokenizer), pairs)
    print(f"pairs               {1e6 * plain:.2f} s a million tokens")
    chat = ChatEncoder(tokenizer)
    for turns in (1, 2, 8):
        grouped = [pairs[i : i + turns] for i in range(0, len(pairs), turns)]
        talks = [
            Conversation(i, tuple(m for pair in group for m in pair.messages))
            for i, group in enumerate(grouped, start=1)
        ]
        print(
            f"chat, {turns} turn{'s' if turns > 1 else ' '}       x {cost(chat, talks) / plain:.2f}"
        )


if __name__ == "__main__":
    main()
