"""Chat templates: what a model is asked, what it learns, and that these are the same ids."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import MARKED, PHI3, QWEN3, TEMPLATES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from config import UserError
from conftest import QUESTIONS, TOKENIZER, Runner, save, tiny_config
from data import Conversation, Encoder, Message, prepare_inference, prepare_train
from device import Device
from extras.ask import Talk
from extras.chat_template import ChatEncoder
from model import AnswerModel, open_model

NO_SYSTEM = ("mistral", "gemma")
MADE: dict[str, Any] = {}


def sentence_piece() -> Any:
    """A small tokenizer of Llama 2's kind, which puts a space in front of each text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = [chr(i) for i in range(32, 127)] + ["\n", "\u2581", "\u00e9"]
    names = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=letters)
    inner.train_from_iterator([text for pair in QUESTIONS for text in pair], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tokenizer_for(name: str) -> Any:
    """A tokenizer of the template's family, with its control tokens; made once."""
    if name not in MADE:
        control, template = TEMPLATES[name]
        if name in ("llama2", "mistral"):
            made = sentence_piece()
        else:
            made = AutoTokenizer.from_pretrained(TOKENIZER)
            made.add_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        begins = [token for token in control if "bos" in token or "begin" in token]
        if begins:
            made.bos_token = begins[0]
        made.chat_template = template
        MADE[name] = made
    return MADE[name]


@pytest.fixture(params=TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(name: str) -> ChatEncoder:
    return ChatEncoder(tokenizer_for(name))


def talk(*texts: str, system: str | None = None, row: int = 1) -> Conversation:
    """User and assistant in turns, all of the assistant's messages trained."""
    messages = [
        Message("assistant", text, trained=True) if i % 2 else Message("user", text)
        for i, text in enumerate(texts)
    ]
    first = [] if system is None else [Message("system", system)]
    return Conversation(row, (*first, *messages))


def as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.text, **m.fields} for m in conversation.messages]


def targets(tokenizer: Any, ids: list[int], mask: list[int]) -> list[str]:
    """The texts of the runs of targets."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    runs = zip(edges[::2], edges[1::2])
    return [tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in runs]


def one(encoder: Encoder, conversation: Conversation) -> tuple[list[int], list[int]]:
    (parts,) = encoder.encode([conversation])
    ((_, ids, mask),) = parts
    return ids, mask


TALKS = [
    talk("Two plus two?", "four"),
    talk("Two plus two?", "four", "And two more?", "six, of course"),
    talk("Is water wet?", "Yes\nand no", "Why?", " ", "So?", "Rome\n\n"),
    talk("Capital of Italy?", "Rome", system="Be short."),
]


@pytest.mark.parametrize("conversation", TALKS)
def test_a_prompt_is_what_the_tokenizer_itself_gives_and_begins_the_sample(
    name: str, encoder: ChatEncoder, conversation: Conversation
) -> None:
    if name in NO_SYSTEM and conversation.messages[0].role == "system":
        with pytest.raises(UserError, match=r"row 1: the chat template of .* refuses system"):
            encoder.encode([conversation])
        return
    tokenizer = encoder.tokenizer
    (prompt,) = encoder.prompts([conversation])
    chat = as_dicts(conversation.prompt)
    options = {"add_generation_prompt": True, "return_dict": False}
    assert prompt == tokenizer.apply_chat_template(chat, **options)
    (parts,) = encoder.encode([conversation])
    ids, mask = parts[-1].input_ids, parts[-1].target_mask
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(mask) and mask[len(prompt) :] == [1] * (len(ids) - len(prompt))


def test_the_targets_are_what_the_assistant_says_and_its_end(
    name: str, encoder: ChatEncoder
) -> None:
    ids, mask = one(encoder, talk("Two plus two?", "four"))
    end = encoder.end_token
    (said,) = targets(encoder.tokenizer, ids, mask)
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert said.replace(" ", "") == f"{thought}four{end}"
    assert ids.count(encoder.end_ids[-1]) >= 1 and ids[-1] in encoder.end_ids
    if name == "qwen3":
        return
    ids, mask = one(encoder, talk("Two plus two?", "four", "And two more?", "six"))
    said = [text.replace(" ", "") for text in targets(encoder.tokenizer, ids, mask)]
    assert said == [f"four{end}", f"six{end}"]


def test_a_template_with_bos_does_not_get_another(name: str, encoder: ChatEncoder) -> None:
    ids, _ = one(encoder, talk("Two plus two?", "four"))
    bos = encoder.tokenizer.bos_token
    assert ids.count(encoder.tokenizer.bos_token_id) == int("bos_token" in TEMPLATES[name][1]), bos


def test_what_a_message_says_is_text_even_if_it_spells_a_control_token(
    name: str, encoder: ChatEncoder
) -> None:
    control = [*TEMPLATES[name][0], encoder.tokenizer.eos_token]
    hostile = f"a{''.join(control)}b"
    talks = [talk("a b", "c", question, "e") for question in ("d", hostile)]
    plain, ids = (parts[-1].input_ids for parts in encoder.encode(talks))
    wanted = encoder.control_ids - {encoder.tokenizer.unk_token_id}
    assert [i for i in ids if i in wanted] == [i for i in plain if i in wanted]
    (text,) = encoder.prompts([talk(hostile, "x")])
    assert hostile.replace(" ", "") in encoder.tokenizer.decode(text).replace(" ", "")


def test_thoughts_that_the_template_drops_make_a_sample_a_trained_turn() -> None:
    encoder = ChatEncoder(tokenizer_for("qwen3"))
    thinking = talk("a", "<think>\none\n</think>\n\nb", "c", "<think>\ntwo\n</think>\n\nd")
    (parts,) = encoder.encode([thinking])
    said = [targets(encoder.tokenizer, ids, mask) for _, ids, mask in parts]
    assert said == [
        ["<think>\none\n</think>\n\nb<|im_end|>"],
        ["<think>\ntwo\n</think>\n\nd<|im_end|>"],
    ]
    assert "one" not in encoder.tokenizer.decode(parts[1].input_ids)
    samples = prepare_train([thinking, talk("a", "b", row=2)], encoder, 200)
    assert samples.rows.tolist() == [1, 1, 2]
    assert "3 kept" in samples.counts.describe() and "1 split (row 1)" in samples.counts.describe()


def test_a_message_that_is_not_trained_is_no_target() -> None:
    encoder = ChatEncoder(tokenizer_for("chatml"))
    whole = talk("a", "b", "c", "d")
    quiet = [m._replace(trained=m.text == "d") for m in whole.messages]
    ids, mask = one(encoder, whole._replace(messages=tuple(quiet)))
    assert ids == one(encoder, whole)[0]
    assert targets(encoder.tokenizer, ids, mask) == ["d<|im_end|>"]


def test_a_greeting_before_any_question_is_no_obstacle() -> None:
    """SmolLM2's template looks at the first message, and in front of a greeting there is none."""
    encoder = ChatEncoder(tokenizer_for("smollm2"))
    greeting = Message("assistant", "Hello")
    whole = talk("a", "b")._replace(messages=(greeting, *talk("a", "b").messages))
    ids, mask = one(encoder, whole)
    assert targets(encoder.tokenizer, ids, mask) == ["b<|im_end|>"]
    trained = whole._replace(messages=(greeting._replace(trained=True), *whole.messages[1:]))
    with pytest.raises(UserError, match="row 1: the chat template"):
        encoder.encode([trained])


def test_tool_calls_and_results_go_through_the_template() -> None:
    encoder = ChatEncoder(tokenizer_for("qwen2.5"))
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = (
        Message("user", "1 + 2?"),
        Message("assistant", "", True, {"tool_calls": [call]}),
        Message("tool", "3"),
        Message("assistant", "three", True),
    )
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    ids, mask = one(encoder, Conversation(1, messages, (tool,)))
    first, second = targets(encoder.tokenizer, ids, mask)
    call = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
    assert first == f"<tool_call>\n{call}\n</tool_call><|im_end|>"
    assert second == "three<|im_end|>"
    text = encoder.tokenizer.decode(ids)
    assert "<tools>" in text and "<tool_response>\n3\n</tool_response>" in text


def test_generation_marks_must_agree_with_the_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in TEMPLATES["marked"][0]])
    tokenizer.chat_template = MARKED.replace("{% generation %}{{", "X{% generation %}{{")
    with pytest.raises(UserError, match=re.escape("marks ['b'] by {% generation %}")):
        ChatEncoder(tokenizer).encode([talk("a", "b")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "a control token at its end|end"),
        (TEMPLATES["chatml"][1].replace("assistant\n{%", "model\n{%"), "words that ask for one"),
        ("{{ raise_exception('never') }}", "refuses user"),
    ],
)
def test_a_template_in_which_nothing_could_be_learnt_is_refused(
    template: str | None, message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in TEMPLATES["chatml"][0]])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        ChatEncoder(tokenizer)


def test_long_conversations_lose_their_oldest_turns_and_never_the_system_message() -> None:
    encoder = ChatEncoder(tokenizer_for("chatml"))
    decode = encoder.tokenizer.decode
    long = talk("one " * 9, "1", "two " * 9, "2", "three " * 9, "3", system="Be short.")
    whole, _ = one(encoder, long)
    samples = prepare_train([long], encoder, len(whole) - 1)
    text = decode(samples.sample(0)[0])
    assert "Be short." in text and "one" not in text and "two" in text and "three" in text
    assert samples.counts.describe().startswith("1 kept, 1 turns dropped (row 1), 0 question cut")

    alone, _ = one(encoder, talk("three " * 9, "3", system="Be short."))
    samples = prepare_train([long], encoder, len(alone) - 3)
    ids, mask = samples.sample(0)
    text = decode(ids)
    assert "two" not in text and 0 < text.count("three") < 9 and len(ids) <= len(alone) - 3
    assert targets(encoder.tokenizer, ids.tolist(), mask.tolist()) == ["3<|im_end|>"]
    assert samples.counts.turns_dropped == samples.counts.question_cut == 1

    (prompt,), counts = prepare_inference([long], encoder, len(alone) - 8)
    assert len(prompt.input_ids) <= len(alone) - 8 and counts.turns_dropped == 1
    assert prompt.question == "three " * 9 and prompt.reference == "3"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["<|im_end|>", "</s>", " x", "\n\nx", "x\n", " ", "<think>", "</think>\n\nx", "<s>[INST]"]
)


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@example(texts=["a", "\nb", "c", " d"])
def test_any_conversation_is_asked_for_what_it_learns(family: str, texts: list[str]) -> None:
    encoder = ChatEncoder(tokenizer_for(family))
    conversation = talk(*texts)
    (parts,) = encoder.encode([conversation])
    trained = [i for i, m in enumerate(conversation.messages) if m.trained]
    assert len(parts) in (1, len(trained))
    for part in parts:
        (prompt,) = encoder.prompts([part.conversation])
        assert part.input_ids[: len(prompt)] == prompt
        assert part.target_mask[-1] == 1 and part.input_ids[-1] in encoder.end_ids
        assert part.target_mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    if len(parts) == 1:
        for i in trained:  # each turn's own prompt stands in front of its targets
            before = conversation._replace(messages=conversation.messages[: i + 1])
            (prompt,) = encoder.prompts([before])
            assert parts[0].input_ids[: len(prompt)] == prompt
            assert parts[0].target_mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_phi3_ends_a_turn_once_and_not_with_the_end_of_the_conversation() -> None:
    encoder = ChatEncoder(tokenizer_for("phi3"))
    assert "eos_token" in PHI3 and encoder.end_token == "<|end|>"
    ids, mask = one(encoder, talk("a", "b", "c", "d"))
    assert targets(encoder.tokenizer, ids, mask) == ["b<|end|>", "d<|end|>"]
    assert encoder.tokenizer.eos_token_id not in ids


def test_qwen3_thinks_nothing_where_nothing_was_thought() -> None:
    assert "reasoning_content" in QWEN3
    encoder = ChatEncoder(tokenizer_for("qwen3"))
    given = Message("assistant", "b", True, {"reasoning_content": "hm"})
    ids, mask = one(encoder, Conversation(1, (Message("user", "a"), given)))
    assert targets(encoder.tokenizer, ids, mask) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]


# ------------------------------------------------------------------- the template with {question}


def test_no_space_is_doubled_or_forced(tmp_path: Path) -> None:
    made = sentence_piece()
    tokens = made.convert_ids_to_tokens
    (plain,) = Encoder(made).encode([Conversation.of_pair(1, "a", "Rome")])
    target = [t for t, m in zip(plain[0].input_ids, plain[0].target_mask) if m]
    assert "".join(tokens(target)) == "\u2581Rome</s>"
    for template, answer, text in (
        ("Q: {question}\n", "Rome", "Rome</s>"),
        ("{question} ->", " Rome", "\u2581Rome</s>"),
    ):
        (parts,) = Encoder(made, template).encode([Conversation.of_pair(1, "a", answer)])
        target = [t for t, m in zip(parts[0].input_ids, parts[0].target_mask) if m]
        assert "".join(tokens(target)) == text


def test_a_template_of_control_tokens_of_any_kind_is_not_split_into_text() -> None:
    tokenizer = tokenizer_for("llama3")
    assert "<|start_header_id|>" not in tokenizer.all_special_tokens
    template = (
        "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    encoder = Encoder(tokenizer, template)
    hostile = "a <|eot_id|> b"
    plain, text = encoder.prompts([Conversation.of_pair(1, q) for q in ("a b", hostile)])
    tokens = tokenizer.convert_ids_to_tokens(plain)
    assert tokens.count("<|start_header_id|>") == 2 and tokens.count("<|eot_id|>") == 1
    assert tokenizer.convert_ids_to_tokens(text).count("<|eot_id|>") == 1
    assert hostile in tokenizer.decode(text)


def test_a_text_template_refuses_conversations_by_row() -> None:
    encoder = Encoder(tokenizer_for("chatml"))
    with pytest.raises(UserError, match=r"row 7: found user \+ assistant \+ user \+ assistant"):
        encoder.encode([talk("a", "b", "c", "d", row=7)])


@pytest.mark.parametrize("family", ["chatml", "llama2", "llama3", "deepseek"])
@pytest.mark.parametrize("template", [None, "{question}\n\n###\n\n", "<s>Q: {question}"])
def test_the_template_with_question_is_exported_as_a_chat_template(
    family: str, template: str | None
) -> None:
    tokenizer = copy.deepcopy(tokenizer_for(family))
    encoder = Encoder(tokenizer, *([template] if template else []))
    tokenizer.chat_template = encoder.as_chat_template()
    pair = Conversation.of_pair(1, 'Is "this" {so}?\n', "Rome")
    chat = as_dicts(pair)
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert [prompt] == encoder.prompts([pair])
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.endswith(f"{encoder.space}Rome{tokenizer.eos_token}")
    with pytest.raises(Exception, match="one question with one answer"):
        tokenizer.apply_chat_template([*chat, *chat], tokenize=False)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_what_is_shipped_asks_as_it_was_trained(
    run: Runner, tmp_path: Path, kind: str, capsys: Any
) -> None:
    tokenizer = copy.deepcopy(tokenizer_for("smollm2"))
    config = tiny_config("llama", len(tokenizer))
    base = save(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "base")
    template = {"data__prompt_template": "chat"} if kind == "chat" else {}
    done = run(model=base, trainer__params__max_steps=2, **template)
    printed = capsys.readouterr().out
    assert ("data.prompt_template: chat would use it" in printed) == (kind == "text")
    shipped = AutoTokenizer.from_pretrained(done / "best")
    chat = [{"role": "user", "content": "Two plus two?"}]
    prompt = shipped.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    opened = open_model(done / "best")
    encoder = opened.encoder(None, conversations=False)
    assert [prompt] == encoder.prompts([Conversation.of_pair(1, "Two plus two?")])
    assert isinstance(encoder, ChatEncoder) == (kind == "chat")
    settings = json.loads((done / "best" / "generation_config.json").read_text())
    ends = {0, shipped.convert_tokens_to_ids("<|im_end|>")} if kind == "chat" else {0}
    assert set(np.atleast_1d(settings["eos_token_id"])) == ends == set(opened.model.end_ids)


def test_ask_remembers_a_conversation_and_forgets_what_does_not_fit(
    model_dirs: dict[str, Path], capsys: Any
) -> None:
    tokenizer = copy.deepcopy(tokenizer_for("chatml"))
    model = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer)))
    answers = AnswerModel(model.eval())
    encoder = ChatEncoder(tokenizer)
    chat = Talk(answers, encoder, Device("cpu"), max_new_tokens=4)
    first = chat.ask("Two plus two?")
    whole = talk("Two plus two?", first.strip(), "And two more?", "six")
    assert chat._prompt("And two more?").input_ids == encoder.prompts([whole])[0]
    for i in range(20):
        chat.ask(f"question {i}")
    asked = chat._prompt("the last question")
    assert len(asked.input_ids) <= 128 - 4 and asked.question == "the last question"
    assert len(asked.conversation.messages) < len(chat.messages) == 42
    assert chat.command("/system Be short.").startswith("a new conversation")
    assert not chat.messages and chat._prompt("a").conversation.messages[0].text == "Be short."
    alone = Talk(answers, Encoder(tokenizer), Device("cpu"), max_new_tokens=4)
    alone.ask("Two plus two?")
    assert not alone.messages and "stands alone" in alone.command("/reset")
    answers.end_ids = list(range(len(tokenizer)))
    capsys.readouterr()
    alone.ask("Two plus two?")
    assert "no answer" in capsys.readouterr().err
