"""Evaluation prompts inside training data, in scripts with spaces between words and without.

The small set below is made by hand. The prompts of each language say the same three things; `inside` hold a prompt in a
longer text, `near` share its beginning or its subject, `other` speak of something else.
"""

import importlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import assistant, user

from hf_eagle.data.overlap import HeldOut, overlap_runs, overlap_statistics, units_of


SET = {
    "English": {
        "prompts": [
            "Explain in simple words why the sky is blue during the day and red in the evening.",
            "Write a short story about an old fisherman who finds a letter in a bottle on the beach.",
            "A train leaves the city at nine and drives eighty kilometres an hour. When does it arrive?",
        ],
        "inside": [
            "Hello! {} Thank you very much.",
            "I have a question for you: {} Please answer it in five sentences, and add an example.",
        ],
        "near": [
            "Explain in simple words why the sky is blue on the earth, but black on the moon.",
            "Write a short story about an old fisherman who loses his boat in a storm at night.",
            "A train leaves the city at nine and drives west. How many passengers are on board?",
        ],
        "other": ["Translate this sentence into French: I would like a cup of coffee with milk, please."],
    },
    "Russian": {
        "prompts": [
            "Объясни простыми словами, почему днём небо голубое, а вечером, на закате, становится красным.",
            "Напиши короткий рассказ о старом рыбаке, который однажды утром находит на берегу бутылку с письмом.",
            "Поезд выходит из города в девять часов и проезжает восемьдесят километров в час. Когда он приедет?",
        ],
        "inside": ["Здравствуйте! {} Большое спасибо.", "У меня к вам вопрос: {} Ответьте в пяти предложениях."],
        "near": [
            "Объясни простыми словами, почему днём небо голубое, а на луне оно всегда остаётся чёрным.",
            "Напиши короткий рассказ о старом рыбаке, который потерял свою лодку во время ночной бури на море.",
            "Поезд выходит из города в девять часов и едет на запад. Сколько в нём пассажиров?",
        ],
        "other": ["Переведи это предложение на французский язык: я хотел бы чашку кофе с молоком, пожалуйста."],
    },
    "Chinese": {
        "prompts": [
            "请用简单的话解释一下,为什么白天的天空是蓝色的,而傍晚却变成红色。",
            "写一个短篇故事,讲一位老渔夫在海滩上的瓶子里发现了一封信。",
            "火车九点出发,时速八十公里,几点到达?",
        ],
        "inside": ["你好!{}谢谢你的帮助。", "我有一个问题想问你:{}请用五句话回答,并举一个例子。"],
        "near": [
            "请用简单的话解释一下,为什么白天的时间在夏天比冬天长。",
            "写一个短篇故事,讲一位老渔夫在暴风雨的夜里失去了他的船。",
            "火车九点出发,时速八十公里,车上有多少乘客?",
        ],
        "other": ["请把下面这句话翻译成法语:我想要一杯加牛奶的咖啡,谢谢。"],
    },
    "Japanese": {
        "prompts": [
            "昼間の空が青く、夕方になると赤く見えるのはなぜか、やさしい言葉で説明してください。",
            "年老いた漁師が浜辺で瓶に入った手紙を見つけるという短い物語を書いてください。",
            "列車は9時に出発し、時速80キロで走ります。到着は何時ですか?",
        ],
        "inside": ["こんにちは。{}よろしくお願いします。", "質問があります。{}五つの文で答え、例も挙げてください。"],
        "near": [
            "昼間の空が青く見えるのに、月の空が黒いのはなぜか、やさしい言葉で説明してください。",
            "年老いた漁師が嵐の夜に自分の船を失うという短い物語を書いてください。",
            "列車は9時に出発し、西へ向かいます。乗客は何人ですか?",
        ],
        "other": ["次の文をフランス語に訳してください。ミルク入りのコーヒーを一杯いただきたいのですが。"],
    },
    "Thai": {
        "prompts": [
            "ช่วยอธิบายด้วยคำง่ายๆ ว่าทำไมท้องฟ้าตอนกลางวันจึงเป็นสีฟ้าและตอนเย็นจึงเป็นสีแดง",
            "เขียนเรื่องสั้นเกี่ยวกับชาวประมงชราที่พบจดหมายในขวดบนชายหาด",
            "รถไฟออกเก้าโมงวิ่งแปดสิบกิโลเมตรต่อชั่วโมง จะถึงกี่โมง",
        ],
        "inside": ["สวัสดีครับ {} ขอบคุณมากครับ", "ผมมีคำถามจะถามคุณว่า{}กรุณาตอบห้าประโยคและยกตัวอย่างด้วย"],
        "near": [
            "ช่วยอธิบายด้วยคำง่ายๆ ว่าทำไมท้องฟ้าบนดวงจันทร์จึงเป็นสีดำ",
            "เขียนเรื่องสั้นเกี่ยวกับชาวประมงชราที่สูญเสียเรือในคืนที่มีพายุ",
            "รถไฟออกเก้าโมงไปทางทิศตะวันตก มีผู้โดยสารกี่คน",
        ],
        "other": ["กรุณาแปลประโยคนี้เป็นภาษาฝรั่งเศส ฉันอยากได้กาแฟใส่นมหนึ่งแก้ว"],
    },
    "Khmer": {
        "prompts": [
            "សូមពន្យល់ដោយពាក្យសាមញ្ញថាហេតុអ្វីបានជាមេឃមានពណ៌ខៀវនៅពេលថ្ងៃនិងពណ៌ក្រហមនៅពេលល្ងាច។",
            "សូមសរសេររឿងខ្លីមួយអំពីអ្នកនេសាទចំណាស់ម្នាក់ដែលរកឃើញសំបុត្រក្នុងដបនៅលើឆ្នេរខ្សាច់។",
            "រថភ្លើងចេញដំណើរម៉ោងប្រាំបួនហើយបើកបរប៉ែតសិបគីឡូម៉ែត្រក្នុងមួយម៉ោង តើវាទៅដល់ម៉ោងប៉ុន្មាន?",
        ],
        "inside": ["សួស្តី! {} សូមអរគុណច្រើន។", "ខ្ញុំមានសំណួរមួយចង់សួរអ្នក៖ {} សូមឆ្លើយជាប្រាំប្រយោគ។"],
        "near": [
            "សូមពន្យល់ដោយពាក្យសាមញ្ញថាហេតុអ្វីបានជាមេឃនៅលើព្រះចន្ទមានពណ៌ខ្មៅ។",
            "សូមសរសេររឿងខ្លីមួយអំពីអ្នកនេសាទចំណាស់ម្នាក់ដែលបាត់ទូកនៅយប់មានព្យុះ។",
            "រថភ្លើងចេញដំណើរម៉ោងប្រាំបួនឆ្ពោះទៅទិសខាងលិច តើមានអ្នកដំណើរប៉ុន្មាននាក់?",
        ],
        "other": ["សូមបកប្រែប្រយោគនេះជាភាសាបារាំង៖ ខ្ញុំចង់បានកាហ្វេទឹកដោះគោមួយកែវ។"],
    },
}
SHORT = "13 words in a row, or all of a prompt of 7 to 12 words"
WITHOUT_SPACES = ("Chinese", "Japanese", "Thai", "Khmer")


@pytest.mark.parametrize("language", SET)
def test_hits_and_false_alarms_of_a_small_set(language):
    """All 6 longer texts that hold a prompt are found, each for its prompt alone, and none of the 4 others."""
    found, held_out = SET[language], HeldOut(SET[language]["prompts"])
    hits = sum(
        held_out.found_in([text.format(prompt)]) == {number}
        for number, prompt in enumerate(found["prompts"])
        for text in found["inside"]
    )
    alarms = [text for text in found["near"] + found["other"] if held_out.found_in([text])]
    assert (hits, alarms) == (6, [])


def test_no_language_is_found_in_another():
    for language, found in SET.items():
        others = [text for name in SET if name != language for text in SET[name]["prompts"] + SET[name]["near"]]
        assert HeldOut(found["prompts"]).found_in(others) == set()


@pytest.mark.parametrize("language", SET)
def test_most_of_a_long_prompt_is_enough_and_a_piece_of_it_is_not(language):
    prompt = max(SET[language]["prompts"], key=lambda text: len(units_of(text)))
    held_out, runs = HeldOut([prompt]), overlap_runs(units_of(prompt))
    between = "" if language in WITHOUT_SPACES else " "
    for run in runs:
        assert held_out.found_in([between.join(run)]) == {0}
        assert held_out.found_in([between.join(run[:-1])]) == set()


# ---- the rule ----


def test_a_run_is_13_words_or_so_many_characters():
    words = " ".join(f"word{n}" for n in range(30))
    han, thai = "".join(chr(0x4E00 + n) for n in range(30)), "".join(chr(0x0E01 + n % 40) for n in range(60))
    assert {len(run) for run in overlap_runs(units_of(words))} == {13}
    assert {len(run) for run in overlap_runs(units_of(han))} == {20}
    assert {len(run) for run in overlap_runs(units_of("かな" * 30))} == {26}
    assert {len(run) for run in overlap_runs(units_of(thai))} == {40}
    # six words and eleven characters: 6/13 + 11/20 > 1 > 6/13 + 10/20
    mixed = units_of("one two three four five six " + han[:11])
    assert overlap_runs(mixed) == [tuple(mixed)] and len(mixed) == 17


@pytest.mark.parametrize(
    "prompt, inside",
    [
        ("who are you, and what for？", False),  # six words: inside a message they are chance
        ("who are you, and what for, today？", True),  # seven
        ("法国的首都是哪里呢？", False),  # nine characters
        ("法国的首都是哪座城市？", True),  # ten
        ("use Python to sort 排序", False),  # four words and two characters
        ("use Python to sort a list 排序", True),
        ("请用Python写一个排序程序", True),
        ("かなかなかなかなかなかな", False),  # twelve
        ("かなかなかなかなかなかなか", True),
    ],
)
def test_a_short_prompt_is_found_as_a_whole_message_and_where_half_a_run_is_there_inside_one(prompt, inside):
    held_out = HeldOut([prompt])
    assert held_out.found_in(["something else", prompt.rstrip("？").upper()]) == {0}
    assert (held_out.found_in([f"好吧 well, {prompt} 谢谢 thanks"]) == {0}) == inside


def test_a_whole_message_of_13_words_is_found_too():
    words = " ".join(f"word{n}" for n in range(13))
    assert HeldOut([words]).found_in([words]) == {0} and HeldOut([" .", ""]).found_in(["", "?"]) == set()


@pytest.mark.parametrize("prompt", ["👍", "❤\ufe0f", "👩\u200d💻 🎉", "?!", "...", "「」", "→ ⇒", "+-*/"])
def test_a_prompt_without_words_is_compared_as_it_is(prompt):
    held_out = HeldOut([prompt, "  ", ""])
    assert held_out.found_in(["a word", f" {prompt}\n"]) == {0}
    assert held_out.found_in([f"well {prompt}", prompt + prompt, "§", " ", ""]) == set()
    messages = [user(prompt), assistant("I see.")]
    assert overlap_statistics([{"messages": messages}], [prompt])["prompts_found"] == 1


def test_overlap_by_13_words():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    prompts = [" ".join(words), "Who are you?", "tell me " + " ".join(words[:12]), "  "]
    records = [
        {
            "messages": [user("So: One, two, three -- " + " ".join(words[3:13]) + "!"), assistant("a")]
        },  # 13 of the first
        {"prompt": " ".join(words[:12]), "completion": "who are you"},  # 12 are not enough; a whole short one
        {"prompt": "I asked who are you", "completion": "b"},  # a short one inside a message is chance
    ]
    assert overlap_statistics(records, prompts) == {"prompts": 4, "prompts_found": 2, "conversations_found": 2}
    assert overlap_statistics(records[2:], prompts)["prompts_found"] == 0


# ---- forms of the same character ----


@pytest.mark.parametrize(
    "text, units",
    [
        ("It's ＦＵＬＬ－ｗｉｄｔｈ，２０２４！", ["it", "s", "full", "width", "2024"]),
        ("ｶﾞｷﾞ・ー", ["ガ", "ギ", "ー"]),  # half-width kana, a dot, and a sign that lengthens
        ("用Python3写、代 码。", ["用", "python3", "写", "代", "码"]),
        ("น้ำ ก็", ["น้ํ", "า", "ก็"]),  # marks belong to their letter
        ("co\u00adoperate ❤\ufe0f \u200eok\u200f", ["cooperate", "ok"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # a script with spaces, whose words have marks
        ("cafe\u0301 CAFÉ ﬁne", ["café", "café", "fine"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("ខ្មែរ។", ["ខ្", "មែ", "រ"]),
    ],
)
def test_units(text, units):
    assert units_of(text) == units


def spread(text: str, between: str) -> str:
    """With something between its characters, a letter's marks kept beside it; words of other scripts stay whole."""
    return between.join(units_of(text))


@pytest.mark.parametrize("language", WITHOUT_SPACES)
@pytest.mark.parametrize("between", [" ", "\n", "，", "\u200b", "\u2060"])
def test_spaces_and_breaks_in_scripts_without_spaces_change_nothing(language, between):
    prompts = SET[language]["prompts"]
    assert HeldOut(prompts).found_in([spread(prompt, between) for prompt in prompts]) == {0, 1, 2}


ALPHABETS = {
    "word": (13, ["ab", "cd", "ef"]),
    "han": (20, list("天地玄黄")),
    "kana": (26, list("あがーン")),
    "khmer": (40, ["ក", "ខា", "ស្ត"]),
}


@given(st.data())
def test_as_a_plain_search_finds(data):
    """Against the rule as it is said, over few units, so that runs repeat and overlap."""
    length, alphabet = data.draw(st.sampled_from(list(ALPHABETS.values())))
    between = " " if length == 13 else ""
    text = st.lists(st.sampled_from(alphabet), max_size=2 * length).map(between.join)
    seed = data.draw(st.integers(0, 99))
    prompt, message = data.draw(text), data.draw(text)
    if data.draw(st.booleans()):  # a part of the prompt, or all of it, in a longer message
        units = units_of(prompt)
        end = random.Random(seed).randint(0, len(units))
        message = between.join([message, *units[:end], alphabet[0]])

    ours, theirs = units_of(prompt), units_of(message)
    wanted = bool(ours) and ours == theirs
    shortest = (length + 1) // 2
    for size in [length] if len(ours) >= length else [len(ours)] if len(ours) >= shortest else []:
        runs = [ours[n : n + size] for n in range(len(ours) - size + 1)]
        wanted |= any(theirs[n : n + size] in runs for n in range(len(theirs) - size + 1))
    assert HeldOut([prompt]).found_in([message]) == ({0} if wanted else set())


@pytest.mark.parametrize(
    ("script", "arguments", "name"),
    [
        ("preview_data", "PreviewArguments", "overlap_prompts"),
        ("regenerate_answers", "RegenerationArguments", "held_out"),
    ],
)
def test_whoever_looks_for_prompts_is_told_what_counts(script, arguments, name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    told = vars(importlib.import_module(script))[arguments].__dataclass_fields__[name].metadata["help"]
    assert f"{SHORT}; a still shorter prompt only if it is the whole message" in told
    assert "in scripts without spaces 20 Chinese characters, 26 kana or 40 letters count as 13 words" in told
