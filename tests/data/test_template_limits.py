"""Templates are programs of strangers: they end, they stay small, and what they say is one sentence."""

import threading

import pytest
from tiny_tokenizer import CHATML, LLAMA3, MARKED, THINKING, assistant, system, tiny_tokenizer, user
from transformers.utils import chat_template_utils

from hf_eagle.data import template_limits
from hf_eagle.data.loss_mask import ConversationEncoder
from hf_eagle.data.rendering import ChatRenderer, TemplateLimit, TemplateRefusal


CHAT = [user("Name a tree."), assistant("oak")]
DOUBLED = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set "
ENDLESS = {
    "ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "lists": "{% set xs = range(99999) | list %}{% for i in xs %}{% for j in xs %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "macro in a loop": "{% macro m() %}{% for i in range(99999) %}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "call blocks": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% for i in range(99999) %}{% call m() %}x{% endcall %}{% endfor %}",
    "recursion": "{% for x in range(99999) recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}"
    "{% endfor %}",
}
HUGE = {
    "text": "{{ 'x' * 10 ** 10 }}",
    "text of a message": "{{ messages[0].content * 10 ** 10 }}",
    "list": "{{ [1] * 10 ** 9 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "sums": DOUBLED + "ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "joined": DOUBLED + "ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "block": DOUBLED + "ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}{{ ns.s }}",
    "macro": "{% macro m(s) %}{{ m(s + s) }}{% endmacro %}{{ m('x') }}",
    **{
        f"filter {number}": "{% set big = 'x \n.' * 9999 %}{% set some = [big] * 9999 %}{{ " + body + " }}"
        for number, body in enumerate(
            (
                *("big | replace('x', big * 9)", "big | replace('', big * 9)", "big | map('replace', '', big) | list"),
                *(
                    "'a' | center(10 ** 9)",
                    "'a' | center(width=10 ** 9)",
                    "'a' | indent(10 ** 9)",
                    "big | indent(9999)",
                ),
                *("big | indent(big)", "some | join(big)", "some | join", "[some, some] | sum(start=[]) | string"),
                *("big | wordwrap(1, wrapstring=big)", "'%999999999d' | format(1)", "some | string", "some | pprint"),
                *(
                    "some | tojson",
                    "[1] | tojson(indent=10 ** 9)",
                    "[1] | batch(10 ** 9, 0) | list",
                    "{'a': some} | xmlattr",
                ),
                *(
                    "[1] | slice(10 ** 9) | list",
                    "['a'] | map('center', 10 ** 9) | list",
                    "big | urlize(target=big)",
                ),
                *(
                    "range(99999) | map('replace', '', big) | list",
                    "range(99999) | map('default', 0) | map('center', 60000) | list",
                ),
            )
        )
    },
    **{
        f"method {number}": "{% set big = 'x \t' * 9999 %}{% set some = [big] * 9999 %}{{ " + body + " }}"
        for number, body in enumerate(
            (
                *("big.replace('x', big * 9)", "big.replace('', big * 9)", "('a' | attr('ljust'))(10 ** 9)"),
                *("'a'.ljust(10 ** 9)", "'a'.rjust(10 ** 9)", "'a'.center(10 ** 9)", "'a'.zfill(10 ** 9)"),
                *("big.expandtabs(99999)", "big.join(some)", "''.join(some)", "big.join(big)", "(1).to_bytes(10 ** 9)"),
                *("'{:999999999}'.format(1)", "'{:{}}'.format(1, 10 ** 9)", "'{a:999999999}'.format_map({'a': 1})"),
                *("('{0}' * 9999).format(big)", "big.translate({120: big})", "'a'.encode().ljust(10 ** 9)"),
            )
        )
    },
    **{
        f"operator {number}": "{% set big = 'x' * 9999 %}{% set some = [big] * 9999 %}{{ " + body + " }}"
        for number, body in enumerate(
            (
                *("'%999999999d' % 1", "'%*d' % (999999999, 1)", "('%s' * 9999) % ((big,) * 9999)", "'%s' % (some,)"),
                *("'' ~ some", "some", "{'a': some}", "'%(a)999999999d' % {'a': 1}"),
            )
        )
    },
    "lists in lists": DOUBLED + "ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "many": "{% set ns = namespace(l=[]) %}{% for i in range(999) %}"
    "{% set ns.l = ns.l + ['%060000000d' % i] %}{% endfor %}",
    "output": "{% set x = 'x' * 60000000 %}{% for i in range(60) %}{{ x }}{% endfor %}",
}


def renderer_of(body: str) -> ChatRenderer:
    """Of a template that goes wrong in the conversation only, not where it is tried out."""
    return ChatRenderer(
        tiny_tokenizer(CHATML + "{% if messages[0].content == 'Name a tree.' %}" + body + "{% endif %}")
    )


@pytest.mark.parametrize("name", sorted(ENDLESS))
def test_a_template_ends(name, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    with pytest.raises(TemplateLimit, match="rendering takes more than 0.1 seconds, so the template may never end"):
        renderer_of(ENDLESS[name]).render(CHAT)
    with pytest.raises(
        TemplateLimit, match="The chat template of `target`'s tokenizer cannot be used: rendering takes"
    ):
        ChatRenderer(tiny_tokenizer(ENDLESS[name]))


@pytest.mark.parametrize("name", sorted(HUGE))
def test_what_a_template_makes_stays_small(name):
    with pytest.raises(TemplateLimit, match="rendering makes more than 67108864 characters"):
        renderer_of(HUGE[name]).render(CHAT)


def test_it_holds_in_threads_and_each_has_its_own_time(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    renderer, found = renderer_of(ENDLESS["ranges"]), []

    def work():
        try:
            renderer.render(CHAT)
        except TemplateLimit as problem:
            found.append(str(problem))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert "Name a bird." in renderer.render([user("Name a bird.")])
    for thread in threads:
        thread.join()
    assert len(found) == 3


def test_an_encoder_names_the_record(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    encoder = ConversationEncoder(renderer_of(ENDLESS["ranges"]).tokenizer)
    with pytest.raises(ValueError, match="Record 7 .* chat template .*: rendering takes more than 0.1 seconds"):
        encoder.encode([CHAT], indices=[7])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{{ raise_exception('no chats here') }}", "no chats here"),
        ("{{ messages[9].x.y }}", "list object has no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
        ("{{ nobody() }}", "'nobody' is undefined"),
        ("{{ lipsum(10 ** 9) }}", "'lipsum' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_whatever_a_template_raises_is_its_refusal(body, said):
    with pytest.raises(TemplateRefusal, match=said):
        renderer_of(body).render(CHAT)


def test_a_template_that_cannot_be_read_and_an_empty_prompt():
    with pytest.raises(TemplateRefusal, match="Encountered unknown tag 'bad'"):
        ChatRenderer(tiny_tokenizer("{% bad %}")).render(CHAT)
    with pytest.raises(TemplateRefusal, match="it makes an empty prompt"):
        ChatRenderer(tiny_tokenizer("{{ '' }}")).prompt(CHAT)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, THINKING, MARKED])
def test_sound_templates_write_what_transformers_alone_makes_of_them(template):
    chats = ([user("a")], [system("s"), user("a"), assistant("b"), user("c" * 5000), assistant("d")])
    for chat in chats:
        for opened in (False, True):
            found = ChatRenderer(tiny_tokenizer(template)).render(chat, add_generation_prompt=opened)
            options = {"messages": chat, "tools": None, "documents": None, "add_generation_prompt": opened}
            alone = chat_template_utils._cached_compile_jinja_template(template)
            special = tiny_tokenizer(template).special_tokens_map
            assert found == alone.render(**options, **special)


def test_expressions_mean_what_they_meant():
    """Of the operators that are looked at, in every place of a template."""
    template = (
        "{% set n = 1 + 2 * 3 %}{% set t = 'a' + 'b' ~ n ~ none %}{% set l = [1] + [2] * 2 %}{% set x %}{{ t + '!' }}"
        "{% endset %}{% macro m(a, b='c' + 'd') %}{{ a + b }}{% endmacro %}{{ n }}{{ t }}{{ l }}{{ x }}"
        "{{ m('e' + 'f') }}{{ 7 % 4 }}{{ '%05.1f|%-4s|%%' % (2.5, 'x') }}{{ '%(a)s' % {'a': 1} }}"
        "{{ '{:>5}{b}'.format(1, b=2) }}"
        "{{ 'a-b' | replace('-', '+') }}{{ 'abab'.replace('a', 'c', 1) }}{{ 'a' | center(9) }}"
        "{{ 'a'.ljust(4) ~ 'b'.zfill(3) }}"
        "{{ ['a', 1] | join(', ') }}{{ messages | join('/', attribute='role') }}{{ '-'.join(['a', 'b']) }}"
        "{{ [1, 2] | sum }}"
        "{{ messages | map(attribute='content') | map('upper') | list }}{{ messages | tojson(indent=2) }}"
        "{{ 'a\nb' | indent }}"
        "{{ 'a\nb' | indent('> ', true) }}{{ range(5) | batch(2, 0) | list }}{{ range(5) | slice(2) | list }}"
        "{{ {'a': [1]} }}"
        "{{ 'a b c' | wordwrap(1) }}{{ '<' | e }}{{ '%s!' | format('x') }}{{ nothing ~ 'x' ~ none ~ 1.5 ~ [1] }}"
        "{{ 'a\tb'.expandtabs(2) }}{{ (5).to_bytes(2, 'big') }}{{ 'ab'.translate({97: 'x'}) }}{{ [1, 'a'] | string }}"
        "{{ 2 ** 10 }}{{ -2 ** 2 }}{{ 3 * 'ab' }}{{ 1.5 * 2 }}{% if 1 + 1 == 2 %}yes{% endif %}"
        "{% for i in [1] + [2] %}{{ loop.index + i }}{% endfor %}{{ 'p' ~ ('q' + 'r') ~ m('s' + 't') }}"
        "{% for message in messages %}{{ message.role + ': ' + message.content | trim }}{% endfor %}"
    )
    alone = chat_template_utils._cached_compile_jinja_template(template).render(messages=CHAT)
    assert ChatRenderer(tiny_tokenizer(template)).render(CHAT) == alone and "yes" in alone
