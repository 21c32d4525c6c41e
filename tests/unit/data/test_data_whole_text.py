"""Prompt and completion are one text: the ids of all six forms of data are those of the tokenizer's own encoding of it.

The tokenizers are in the styles of SentencePiece (Llama 2, Mistral, TinyLlama, Phi-3), whose words carry the space before
them and whose first word has one put in front, and of byte-level BPE with merges and trimmed offsets (GPT-2, Llama 3).
"""

from __future__ import annotations

import copy
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scale_sft.data.tokens import TextTokenizer
from scale_sft.model.loss import IGNORED

TEXTS = ["def f(", "x):", "a ", " a", "é", "😀", "", "\n", "  b", "f( x", "Yes.", "é é", " "]
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }} [/INST]"
    "{% else %} {{ turn.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece_like(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>"])}
    merges = [("d", "e"), ("de", "f"), ("▁", "def"), ("▁", "f"), ("(", "x"), ("▁", "x"), ("▁", "Y"), ("▁Y", "e"),
              ("▁", "▁"), ("▁", "a"), (".", "\n")]  # fmt: skip
    for token in [
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abdefxyYIsNST()[]/:.#Input\nRroncteuk",
        *map("".join, merges),
    ]:
        vocabulary.setdefault(token, len(vocabulary))
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(trim: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("Ġ", "b"), ("Ġ", "a"), ("(", "x"), (".", "Ċ"), ("Ã", "©")]
    vocabulary = {token: n for n, token in enumerate([*alphabet, *map("".join, merges), "<s>", "</s>"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


MADE = {
    "SentencePiece": sentencepiece_like(),
    "without <s>": sentencepiece_like(False),
    "bytes": byte_level(False),
    "trimmed": byte_level(True),
}


def encodings(read, put, tokenizer, rows, **options):
    examples = read(put("rows.jsonl", rows), tokenizer, **options)
    return [(ids.tolist(), (labels != IGNORED).tolist()) for ids, labels in map(examples.tokens, range(len(examples)))]


@pytest.mark.parametrize("tokenizer", MADE.values(), ids=MADE)
def test_a_prompt_with_its_completion_is_what_the_tokenizer_makes_of_both(tokenizer, read, put):
    pairs = [(prompt, completion) for prompt in TEXTS for completion in TEXTS if completion]
    found = encodings(read, put, tokenizer, [{"prompt": p, "completion": c} for p, c in pairs])
    for (prompt, completion), (ids, counts) in zip(pairs, found, strict=True):
        own = tokenizer(prompt + completion)["input_ids"]
        assert ids == [*own, tokenizer.eos_token_id], (prompt, completion)
        border = counts.index(True)
        assert all(counts[border:]), (prompt, completion)
        added = len(own) - len(tokenizer(prompt + completion, add_special_tokens=False)["input_ids"])
        without_last = tokenizer(prompt + completion[:-1], add_special_tokens=False)["input_ids"]
        assert border - added <= len(without_last), "the last character counts"
        alone = tokenizer(prompt)["input_ids"]
        if ids[: len(alone)] == alone and prompt:  # no token runs over the border
            assert border == len(alone), (prompt, completion)
        elif prompt:  # one does: it counts, and nothing before it
            same = next(n for n, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b)
            assert same <= border <= len(alone)


def test_the_token_over_the_border_counts_as_completion(read, put):
    tokenizer = MADE["SentencePiece"]
    ((ids, counts),) = encodings(read, put, tokenizer, [{"prompt": "def f(", "completion": "x):"}])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁def", "▁f", "(x", ")", ":", "</s>"]
    assert counts == [False, False, False, True, True, True, True]


@pytest.mark.parametrize("name", MADE)
def test_all_six_forms_of_data_are_the_tokenizers_own_encoding_of_the_whole_text(name, read, put):
    tokenizer = copy.deepcopy(MADE[name])
    chat = [{"role": "user", "content": "def f("}, {"role": "assistant", "content": "x): é."}]
    alpaca = {"instruction": "def f(", "input": "a ", "output": "x): é."}
    headed = "### Instruction:\ndef f(\n\n### Input:\na \n\n### Response:\nx): é."
    text = lambda whole: [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
    written = lambda turns: tokenizer.apply_chat_template(turns, return_dict=False)
    expected = [
        ({"prompt": "def f(", "completion": "x): é."}, text("def f(x): é.")),
        ({"text": "def f(x): é."}, text("def f(x): é.")),
        (alpaca, text(headed)),
    ]
    for row, ids in expected:
        assert encodings(read, put, tokenizer, [row], loss_on="all") == [(ids, [True] * len(ids))]
    tokenizer.chat_template = TEMPLATE
    for row, turns in [
        ({"messages": chat}, chat),
        ({"prompt": chat[:1], "completion": chat[1:]}, chat),
        (alpaca, [{"role": "user", "content": "def f(\n\na "}, chat[1]]),
    ]:
        ((ids, counts),) = encodings(read, put, tokenizer, [row])
        assert ids == written(turns)
        assert tokenizer.decode([token for token, c in zip(ids, counts, strict=True) if c]).strip() == "x): é.</s>"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("<s>a", "b"), ("a", "b</s>"), ("<s>a", "b</s>"), ("", "<s>a</s>"), ("a", "b</s>\n")],
)
def test_special_tokens_that_the_text_spells_out_are_not_doubled(prompt, completion, read, put, tokenizer):
    ((ids, _),) = encodings(read, put, tokenizer, [{"prompt": prompt, "completion": completion}])
    assert ids.count(tokenizer.bos_token_id) == 1 == ids.count(tokenizer.eos_token_id)
    assert (
        tokenizer.decode(ids).strip()
        == "<s>" + (prompt + completion).strip().removeprefix("<s>").removesuffix("</s>") + "</s>"
    )


@pytest.mark.parametrize(
    ("single", "before", "after"),
    [("$A", [], [257]), ("<s> $A", [256], [257]), ("<s> $A </s>", [256], [257]), ("$A </s>", [], [257])],
)
def test_the_frame_is_that_of_the_tokenizers_own_call_with_one_end(single, before, after, tokenizer):
    made = copy.deepcopy(tokenizer)
    special = [("<s>", 256), ("</s>", 257)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    assert TextTokenizer(made).framed([65], "b") == ([*before, 65, *after], len(before))


def test_a_character_of_several_tokens_counts_whole(read, put, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role[0] }}{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    chat = [
        {"role": "user", "content": "😀"},
        {"role": "assistant", "content": "😀é"},
        {"role": "user", "content": "é"},
    ]
    ((ids, counts),) = encodings(read, put, tokenizer, [{"messages": chat}])
    assert tokenizer.decode([token for token, c in zip(ids, counts, strict=True) if c]) == "😀é"
    assert json.dumps(counts).count("true") == 6
