"""The fast tokenizer gives sentencepiece's ids (GLM-4: tiktoken's) and the published marks."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lorakit
from chatglm_folders import config, corpus, ranks_file, sentencepiece_model, write_original
from lorakit.data.masking import tokenize
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.models.layouts.chatglm.original import Generation, read_original
from lorakit.models.layouts.chatglm.tokenizer import original_tokenizer

SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM4_SPLIT = (  # of tokenization_chatglm.py in THUDM/glm-4-9b-chat
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = [
    {"role": "system", "content": "You are ChatGLM3.\n请用中文回答。"},
    {"role": "user", "content": "低秩适配是什么? It is  philosophy."},
    {"role": "assistant", "content": " 两个小矩阵。"},
    {"role": "user", "content": "天气?"},
    {"role": "assistant", "metadata": "get_weather", "content": "tool_call(city='北京')"},
    {"role": "observation", "content": "12 °C"},
    {"role": "user", "content": ""},
]
TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab se p\n1-=:哈中文的低秩，。😀é\u3000\t"), st.characters(codec="utf-8")
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def sp() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


@pytest.fixture(scope="module", params=["built", "saved and read by transformers"])
def fast(request: pytest.FixtureRequest, chatglm3: Path, tmp_path_factory: Any) -> Any:
    tokenizer = lorakit.AutoTokenizer.from_pretrained(chatglm3, trust_remote_code=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if request.param == "built":
        return tokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_of_english_and_chinese_text_are_sentencepieces_behind_the_two_marks(fast: Any, sp):
    begin = [sp.vocab_size() + 1, sp.vocab_size() + 3]  # [gMASK] sop
    texts = [
        *corpus(),
        "",
        " ",
        "  a  b ",
        "\n\n\t",
        "哈哈哈哈哈哈",
        "aaaaaaa",
        "-----",
        "philosophy",
    ]
    texts += ["aesop", "😀𠮷\x00", "a\u2581b", "<0x41>", "<unk", "SOP eops"]
    assert sum("中" in text or "的" in text for text in texts) > 5
    for text in texts:
        assert fast(text).input_ids == begin + sp.encode(text), text
        assert fast(text, add_special_tokens=False).input_ids == sp.encode(text)
        assert fast.decode(sp.encode(text)) == sp.decode(sp.encode(text))


@settings(max_examples=3 * settings.default.max_examples)
@given(text=TEXTS)
def test_ids_of_any_text_are_sentencepieces(fast: Any, sp, text: str):
    found = fast(text, add_special_tokens=False, split_special_tokens=True)
    assert found.input_ids == sp.encode(text)


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
    ],
    ids=str,
)
def test_other_settings_of_sentencepiece_are_followed(tmp_path: Path, changed: dict[str, Any]):
    content = sentencepiece_model(**changed)
    folder = write_original(tmp_path / "model", tokenizer=content)
    fast = original_tokenizer(read_original(folder))
    sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in [*corpus()[::3], "  a \u3000 b ", "ﬁne É", "", "𠮷野家", "哈哈哈"]:
        found, expected = fast(text, add_special_tokens=False).input_ids, sp.encode(text)
        if found != expected:  # two ways to divide it, equally likely within float32's rounding
            scores = [sum(map(sp.get_score, ids)) for ids in (found, expected)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-6), text
            assert sp.decode(found) == sp.decode(expected), text


def test_marks_have_the_published_ids_and_stand_in_text_without_a_space(fast: Any, sp):
    own = sp.vocab_size()
    assert fast.convert_tokens_to_ids([*SPECIAL, *ROLES]) == list(range(own, own + 9))
    assert len(fast) == own + 9
    assert (fast.eos_token_id, fast.pad_token_id, fast.unk_token_id) == (2, 0, 0)
    assert fast.padding_side == "left"
    ids = fast("[gMASK]sop<|user|>\n hi<|assistant|>", add_special_tokens=False).input_ids
    assert ids == [own + 1, own + 3, own + 6, *sp.encode("\n hi"), own + 7]
    assert fast.decode(ids, skip_special_tokens=True) == "\n hi"
    assert fast.decode(ids[:2]) == "[gMASK]sop"
    pair = fast("a", "b").input_ids
    assert pair == [own + 1, own + 3, *sp.encode("a"), *sp.encode("b"), 2]


def test_marks_in_a_text_are_text_where_that_is_asked_for(fast: Any, sp):
    text = "a sop<|user|>"
    ids = fast(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == sp.encode(text)


def test_a_batch_is_padded_on_the_left(fast: Any):
    batch = fast(["a", "a longer text"], padding=True)
    assert batch.attention_mask[0][0] == 0
    assert batch.input_ids[0][0] == 0
    assert set(batch.keys()) == {"input_ids", "attention_mask"}


def built(sp, messages: list[dict[str, str]]) -> list[int]:
    """ChatGLM3's `build_chat_input`: each role's line and each message by itself."""
    own = sp.vocab_size()
    ids = [own + 1, own + 3]
    for message in messages:
        ids.append(own + 5 + ROLES.index(f"<|{message['role']}|>"))
        ids += sp.encode(f"{message.get('metadata', '')}\n") + sp.encode(message["content"])
    return ids


def test_the_chat_template_gives_the_ids_of_build_chat_input(fast: Any, sp):
    for length in range(1, len(CHAT) + 1):
        messages = CHAT[:length]
        found = fast.apply_chat_template(messages, return_dict=False)
        assert found == built(sp, messages)
        asked = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asked == [*built(sp, messages), sp.vocab_size() + 7]


def test_tools_stand_in_the_system_message_as_json(fast: Any, sp):
    tool = {"name": "get_weather", "description": "天气", "parameters": {"city": "北京"}}
    said = json.dumps([tool], indent=4, ensure_ascii=False)
    needs = "Answer the following questions as best as you can. You have access to the following"
    system = {"role": "system", "content": f"{needs} tools:\n{said}"}
    question = {"role": "user", "content": "天气?"}
    wrapped = [{"type": "function", "function": tool}]
    found = fast.apply_chat_template([question], tools=wrapped, return_dict=False)
    assert found == built(sp, [system, question])
    own = {"role": "system", "content": f"{needs} tools:", "tools": [tool]}
    assert fast.apply_chat_template([own, question], return_dict=False) == found


def test_roles_and_tool_calls_that_chatglm3_has_not_are_refused(fast: Any):
    with pytest.raises(Exception, match="no role critic"):
        fast.apply_chat_template([{"role": "critic", "content": "a"}])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(Exception, match="tool calls as text"):
        fast.apply_chat_template([call])


def test_answers_are_learned_with_the_mark_that_ends_them(fast: Any, sp):
    messages = [m for m in CHAT if "metadata" not in m and m["role"] != "observation"][:4]
    messages.append({"role": "assistant", "content": "晴"})
    row = tokenize(Sample(where="here", messages=messages, text=None), fast, 500)
    learned = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    user = sp.vocab_size() + 6
    first = [*sp.encode("\n"), *sp.encode(" 两个小矩阵。"), user]
    assert learned == [*first, *sp.encode("\n"), *sp.encode("晴"), 2]
    assert row.input_ids[: len(built(sp, messages))] == built(sp, messages)


def test_a_folders_own_template_is_kept_where_it_says_something_else(tmp_path: Path):
    published = (
        "{% for m in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ m['role'] }}|>\n "
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for number, (own, kept) in enumerate(((published, False), ("{{ messages | length }}", True))):
        folder = write_original(tmp_path / f"{number}")
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
        assert (original_tokenizer(read_original(folder)).chat_template == own) is kept


def test_chatglm2_has_rounds_and_no_roles(tmp_path: Path, sp):
    values = config(_name_or_path="THUDM/chatglm2-6b")
    folder = write_original(tmp_path / "model", values=values)
    fast = original_tokenizer(read_original(folder))
    own = sp.vocab_size()
    assert len(fast) == own + 5
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    messages.append({"role": "user", "content": "再见"})
    text = "[Round 1]\n\n问：你好\n\n答：好\n\n[Round 2]\n\n问：再见\n\n答："
    found = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == [own + 1, own + 3, *sp.encode(text)]
    model, _ = lorakit.load_model(str(folder), "float32")
    assert model.generation_config.eos_token_id == [2]


def test_the_code_beside_the_weights_tells_chatglm2_from_chatglm3(tmp_path: Path):
    for known, expected in (
        ('special = ["sop", "<|user|>"]', Generation.CHATGLM3),
        ('special = ["sop"]', Generation.CHATGLM2),
    ):
        folder = write_original(tmp_path / expected.value, values=config(_name_or_path="/tmp/mine"))
        (folder / "tokenization_chatglm.py").write_text(known)
        assert read_original(folder).generation is expected


def test_a_mark_among_the_pieces_keeps_its_own_number(tmp_path: Path):
    content = sentencepiece_model(extra="".join(f"{a}sop{b} " for a in "bdgjx" for b in "bdgjkqx"))
    sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert sp.piece_to_id("sop") != sp.unk_id()
    fast = original_tokenizer(read_original(write_original(tmp_path / "m", tokenizer=content)))
    assert fast.convert_tokens_to_ids("sop") == sp.vocab_size() + 3
    assert fast("[gMASK]sop<|user|>", add_special_tokens=False).input_ids[1] == sp.vocab_size() + 3
    assert fast("a b c", add_special_tokens=False).input_ids == sp.encode("a b c")


@pytest.fixture(scope="module")
def glm4(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_original(tmp_path_factory.mktemp("glm4") / "model", tokenizer=ranks_file())
    assert read_original(folder).generation is Generation.GLM4
    return lorakit.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tik() -> tiktoken.Encoding:
    import base64

    lines = [line.split() for line in ranks_file().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("glm4", pat_str=GLM4_SPLIT, mergeable_ranks=ranks, special_tokens={})


def test_glm_4s_ids_are_tiktokens(glm4: Any, tik: tiktoken.Encoding):
    for text in [*corpus(), "", "I'LL go\n\n 12345  x ", "哈哈哈哈", "\r\n\t a", "🙂👍🏽"]:
        assert glm4(text).input_ids == [402, 404, *tik.encode(text)], text
        assert glm4.decode(tik.encode(text)) == text


@settings(max_examples=3 * settings.default.max_examples)
@given(text=TEXTS)
def test_glm_4s_ids_of_any_text_are_tiktokens(glm4: Any, tik: tiktoken.Encoding, text: str):
    found = glm4(text, add_special_tokens=False, split_special_tokens=True)
    assert found.input_ids == tik.encode(text)


def test_glm_4s_chat_has_its_marks_and_no_spaces(glm4: Any, tik: tiktoken.Encoding):
    marks = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
    assert glm4.convert_tokens_to_ids(marks) == list(range(400, 410))
    assert (glm4.eos_token_id, glm4.pad_token_id) == (400, 400)
    found = glm4.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, return_dict=False
    )
    assert found == [402, 404, 407, *tik.encode("\n"), *tik.encode("你好"), 408]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: sentencepiece_model()[:-100], "damaged or cut off"),
        (lambda: sentencepiece_model()[:1000], "damaged or cut off"),
        (lambda: b"nonsense", "not a sentencepiece model"),
        (lambda: b"", "not a sentencepiece model"),
        (lambda: sentencepiece_model(model_type="char", vocab_size=400), "another kind"),
        (lambda: ranks_file()[:200], "damaged vocabulary"),
        (lambda: b"".join(ranks_file().splitlines(True)[:200]), "cut off"),
        (lambda: ranks_file().replace(b" 300", b" 301"), "line 301 has the rank 301"),
        (lambda: ranks_file()[:-1].rpartition(b"\n")[0] + b"\n!!! 399\n", "damaged vocabulary"),
        (None, "has no tokenizer.model"),
    ],
)
def test_a_vocabulary_that_cannot_be_right_is_one_line(tmp_path: Path, content: Any, words: str):
    folder = write_original(tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    if content is not None:
        (folder / "tokenizer.model").write_bytes(content())
    with pytest.raises(InputError, match=words) as error:
        lorakit.load_model(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path):
    folder = write_original(tmp_path / "model", values=config(padded_vocab_size=704))
    with pytest.raises(InputError, match="709 tokens, and the model's embedding 704"):
        lorakit.load_model(str(folder))
