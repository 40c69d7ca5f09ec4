"""Write data/tiny-gpt-neo/: config and tokenizer of a GPT-Neo small enough to train in a minute.

    python data/make_model.py            # write the directory
    python data/make_model.py --check    # exit 1 if a file there is not what this would write

There are no weights in it: sft initialises the model at random (`model_params.from_scratch: true`).
With data/facts.json it is what the default configs train, so that everything runs without a
download. `data/make_facts.py` has to run first: the tokenizer is learnt from its training split.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
FACTS = HERE / "facts.json"
OUT = HERE / "tiny-gpt-neo"

EOS = "<|endoftext|>"  # begin, end and unknown in one, as in GPT-Neo
VOCAB_SIZE = 1536
CONTEXT = 256


def train_tokenizer(facts: Path) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly VOCAB_SIZE tokens, learnt from the training split.

    Only from that split: the others are there to test with. All 256 bytes are tokens, so that it
    encodes any text, and it adds no token by itself.
    """
    pairs = json.loads(facts.read_text(encoding="utf-8"))["train"]
    # The text as the model sees it. Answers come after a space there, just as inside a question,
    # so that " Paris" is the same token in both places.
    texts = [f"Question: {pair['Question']} \nAnswer: {pair['Answer']}" for pair in pairs]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"got {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}")
    return tokenizer


def model_config(eos_token_id: int) -> dict[str, Any]:
    """The fields of transformers' GPTNeoConfig that are not at their defaults, and the sizes."""
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 512,
        "max_position_embeddings": CONTEXT,
        # One layer of each kind. The window is shorter than the context, as in the real GPT-Neo, so
        # that on long inputs the two really differ.
        "attention_types": [[["global", "local"], 1]],
        "window_size": 32,
        # GPT-Neo's 0.02 is meant for larger widths. Measured here, two layers, 12 epochs of
        # facts.json at the better of the rates tried: 0.02 -> 42 % of the test answers right,
        # 0.05 -> 100 %, 0.08 -> 96 %.
        "initializer_range": 0.05,
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
    }


def make_files(facts: Path) -> dict[str, bytes]:
    """File name -> content. Written here and not by save_pretrained, whose output changes from one
    version of transformers to the next.
    """
    tokenizer = train_tokenizer(facts)
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",  # GPT-Neo's own
        "model_max_length": CONTEXT,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
    }
    texts = {
        "config.json": json.dumps(model_config(tokenizer.get_vocab()[EOS]), indent=2),
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
    }
    return {name: (text + "\n").encode() for name, text in texts.items()}


def main() -> int:
    """Write or check the directory; returns the exit code."""
    parser = argparse.ArgumentParser(description="make the default model's config and tokenizer")
    parser.add_argument("--facts", type=Path, default=FACTS, help="data to learn tokens from")
    parser.add_argument("--out", type=Path, default=OUT, help="directory to write or check")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it differs")
    args = parser.parse_args()
    files = make_files(args.facts)
    if args.check:
        different = [
            name
            for name, content in files.items()
            if not (args.out / name).is_file() or (args.out / name).read_bytes() != content
        ]
        for name in different:
            print(f"{args.out / name}: differs from what make_model.py writes")
        print(f"{args.out}: {len(files) - len(different)} of {len(files)} files up to date")
        return 1 if different else 0
    args.out.mkdir(exist_ok=True)
    for name, content in files.items():
        (args.out / name).write_bytes(content)
    print(f"{args.out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
