"""Whose words a token holds, with templates as chat models have them."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import small_models
from transformers import PreTrainedTokenizerFast

from saepipe.chat_template import ChatTemplate
from saepipe.config import DataConfig
from saepipe.conversations import Conversation, Message
from saepipe.errors import UserError

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
    ),
    # Strips contents, and puts the system's into the first user's.
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # Renames the assistant, trims contents, knows no system.
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    ),
}
TALK = (
    Message("user", "  the quick brown fox?\n"),
    Message("assistant", "over the lazy dog. Ünïcödé 😀 日本語"),
    Message("user", "the quick brown fox?"),
    Message("assistant", "over"),
)
SYSTEM = Message("system", "There was one small model, with many layers")
LOOKALIKES = (Message("user", "user"), Message("assistant", "<"), Message("user", "i"), Message("assistant", "\n"))


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = small_models.tokenizer()
    made.chat_template = TEMPLATES.get(str(template), template)
    return made


def chat(template: str | None) -> ChatTemplate:
    return ChatTemplate(DataConfig(chat_template="default", column="messages"), tokenizer(template))


def texts_of(template: ChatTemplate, conversation: Conversation) -> list[tuple[str, str]]:
    """The role and the text of each run of tokens of one role."""
    ((ids, roles),) = template.encode([(0, conversation)])
    assert ids.dtype == roles.dtype == np.int32
    runs = itertools.groupby(zip(ids.tolist(), roles.tolist(), strict=True), lambda pair: pair[1])
    return [
        (template.roles[role], template._tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        for role, run in runs
    ]


def test_chatml() -> None:
    assert texts_of(chat("chatml"), (SYSTEM, *TALK)) == [
        ("template", "<|im_start|>system\n"),
        ("system", SYSTEM.content),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", TALK[0].content),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", TALK[1].content),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", TALK[2].content),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "over"),
        ("template", "<|im_end|>\n"),
    ]


def test_llama2_strips_and_joins() -> None:
    """A token that holds a space of the markup and the first word is the word's."""
    assert texts_of(chat("llama2"), (SYSTEM, *TALK)) == [
        ("template", "<bos>[INST] <<SYS>>\n"),
        ("system", SYSTEM.content),
        ("template", "\n<</SYS>>\n\n"),
        ("user", TALK[0].content.rstrip()),
        ("template", " [/INST]"),
        ("assistant", " " + TALK[1].content),
        ("template", " <eos><bos>[INST]"),
        ("user", " " + TALK[2].content),
        ("template", " [/INST]"),
        ("assistant", " over"),
        ("template", " <eos>"),
    ]


def test_gemma_renames_and_trims() -> None:
    template = chat("gemma")
    assert texts_of(template, TALK)[:5] == [
        ("template", "<bos><start_of_turn>user\n"),
        ("user", TALK[0].content.strip()),
        ("template", "<end_of_turn>\n<start_of_turn>model\n"),
        ("assistant", TALK[1].content),
        ("template", "<end_of_turn>\n<start_of_turn>user\n"),
    ]
    assert template.roles == ["template", "user", "assistant"]
    with pytest.raises(
        UserError,
        match=r"data.column=messages, row 3 .*: data.chat_template=default cannot write the conversation "
        r"\(System role not supported\); leave such conversations out, or give",
    ):
        template.encode([(3, (SYSTEM, *TALK))])


def test_contents_that_read_like_markup() -> None:
    assert texts_of(chat("chatml"), LOOKALIKES) == [
        ("template", "<|im_start|>user\n"),
        ("user", "user"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "<"),
        ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", "i"),
        ("template", "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"),  # white space alone is nobody's words
    ]


def test_special_tokens_of_the_template_and_empty_contents() -> None:
    template = chat("llama2")
    ((ids, roles),) = template.encode([(0, (Message("user", ""), Message("assistant", "over")))])
    assert (ids[0], ids[-1]) == (0, 1)
    assert texts_of(template, (Message("user", ""), Message("assistant", "over"))) == [
        ("template", "<bos>[INST]  [/INST]"),
        ("assistant", " over"),
        ("template", " <eos>"),
    ]
    assert roles[ids < 2].max() == 0


OPEN, CLOSE = "\uf8fe", "\uf8ff"
WRITTEN = {"chatml": "message['content']", "llama2": "content.strip()", "gemma": "message['content'] | trim"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_content_is_found_where_it_was_written(name: str) -> None:
    """The same template with brackets around contents tells the truth, for contents that look like anything else."""
    chance = random.Random(name)
    template = chat(name)
    bracketed = chat(TEMPLATES[name].replace(WRITTEN[name], f"'{OPEN}' + ({WRITTEN[name]}) + '{CLOSE}'"))
    pieces = ["user", "assistant", "<", "|im_end|>", "[INST]", " ", "\n", "\t", "a", "é", "😀", "\ue000", "0", "model"]
    for _ in range(200):
        contents = ["".join(chance.choices(pieces, k=chance.randrange(5))) for _ in range(5)]
        conversation = tuple(Message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents))
        text, spans = template._rendered(0, conversation)
        truth = bracketed._render(conversation)
        assert text == truth.replace(OPEN, "").replace(CLOSE, "")
        starts = [match.start() - 2 * n for n, match in enumerate(re.finditer(OPEN, truth))]
        stops = [match.start() - 2 * n - 1 for n, match in enumerate(re.finditer(CLOSE, truth))]
        assert [(span.start, span.stop, template.roles[span.role]) for span in spans] == [
            (start, stop, message.role)
            for start, stop, message in zip(starts, stops, conversation, strict=True)
            if message.content.strip()
        ]


def test_templates_that_ask_what_a_content_says() -> None:
    """Markup that differs from content to content, as Qwen 3's around <think>; contents stand as they are."""
    asking = (
        "{% for message in messages %}{% set content = message.content %}"
        "{% if '</think>' in content %}{{ '[' + message.role + ']' + content }}"
        "{% else %}{{ '[' + message.role + ']<think></think>' + content }}{% endif %}{% endfor %}"
    )
    conversation = (Message("user", "fox"), Message("assistant", "<think>dog</think>over"))
    assert texts_of(chat(asking), conversation) == [
        ("template", "[user]<think></think>"),
        ("user", "fox"),
        ("template", "[assistant]"),
        ("assistant", "<think>dog</think>over"),
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{% for message in messages %}{{ message.content | tojson }}{% endfor %}",
        "{% for message in messages %}{{ message.content.split('model')[-1] }}{% endfor %}",
        "nothing at all",
    ],
)
def test_templates_that_drop_or_change_a_content(template: str) -> None:
    quoted = Message("system", SYSTEM.content + ' "so to speak"')
    with pytest.raises(
        UserError,
        match=r"data.column=messages, row 5 .*: data.chat_template=default drops or changes the content of message 0;",
    ):
        chat(template).encode([(5, (quoted, *TALK))])


def test_a_content_that_is_written_twice_or_out_of_order() -> None:
    twice = "{{ messages[1].content }}|{{ messages[0].content }}|{{ messages[1].content }}"
    assert texts_of(chat(twice), (SYSTEM, Message("user", "over"))) == [
        ("user", "over"),
        ("template", "|"),
        ("system", SYSTEM.content),
        ("template", "|"),
        ("user", "over"),
    ]


def test_a_template_that_tells_the_date_tells_the_same_one_every_day() -> None:
    dated = "\n{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + TEMPLATES["chatml"]
    assert texts_of(chat(dated), TALK)[0] == ("template", "\n26 Jul 2024<|im_start|>user\n")


def test_templates_from_files(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATES["chatml"])
    template = ChatTemplate(DataConfig(chat_template=str(path)), tokenizer(None))
    assert texts_of(template, TALK) == texts_of(chat("chatml"), TALK)
    assert template.hash == chat("chatml").hash != chat("gemma").hash
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"data.chat_template=.*own.jinja cannot be read .*give `default` or the path"):
        ChatTemplate(DataConfig(chat_template=str(path)), tokenizer(None))
    path.write_text("{% for %}")
    with pytest.raises(UserError, match=r"own.jinja cannot write the conversation \(.*\)"):
        ChatTemplate(DataConfig(chat_template=str(path)), tokenizer(None)).encode([(0, TALK)])


def test_tokenizers_that_cannot() -> None:
    with pytest.raises(
        UserError, match=r"data.chat_template=default means the tokenizer's own .*model.name has none; give"
    ):
        chat(None)
    from transformers import CTRLTokenizer

    slow = CTRLTokenizer.__new__(CTRLTokenizer)
    with pytest.raises(UserError, match=r"data.chat_template=default needs a fast tokenizer.*\(CTRLTokenizer\); give"):
        ChatTemplate(DataConfig(chat_template="default"), slow)


def test_more_roles_than_a_byte_can_tell() -> None:
    template = chat("chatml")
    roles = tuple(Message(f"role {number}", "a") for number in range(255))
    ((_, numbers),) = template.encode([(0, roles)])
    assert set(numbers.tolist()) == set(range(256))
    with pytest.raises(UserError, match="has the role 'one', one more than the 255 that are possible"):
        template.encode([(1, (Message("one", "a"),))])
