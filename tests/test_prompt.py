"""What a model is asked about a photo: the prompt, what is known of the photo, and the language."""

import hashlib

import pytest
import servers
from worlds import CHATS, PROMPT, ApiWorld, asking

import immich_analyze as ia

FACTS = {
    "people": [{"name": "Anna {{ 7 * 7 }}"}, {"name": "Ben", "birthDate": "2012-01-31"}],
    "exifInfo": {"city": "Warnemünde", "country": "Germany", "latitude": 54.18, "longitude": 12.08},
    "localDateTime": "2019-07-14T15:30:00Z",
    "ocr": [{"text": "CAFÉ,"}, {"text": "open\n\ndaily"}],
}
TOLD = "Anna {{ 7 * 7 }}, Ben (aged 7)"
RUSSIAN, GERMAN = "Кошка сидит на подоконнике и смотрит", "Eine Katze sitzt am Fenster und schaut"
CHINESE = "一只猫坐在窗台上看着外面的街道"


@pytest.fixture
def asked(config):
    """What is asked about a photo of which these facts are known."""

    def ask(*argv: str, told=FACTS) -> str:
        text = "At the sea" if told else ""
        return ia.question(ia.Photo("id", "photo.jpg", text, "", told=told), config(*argv))

    return ask


@pytest.mark.parametrize("prompt", ["Describe.\n", "\r\n\n\n Say {}, }} or % \n\n", PROMPT])
def test_a_plain_prompt_is_asked_to_the_byte_and_keeps_the_name_it_had(asked, config, prompt):
    assert asked("--prompt", prompt) == prompt
    before = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    assert config("--prompt", prompt).prompt_id == before


def test_what_is_known_follows_the_prompt_each_fact_once_and_the_language_last(asked):
    told = asked("--prompt", "Look.\n", "--context", "all", "--description-language", "de")
    first, context, last = told.split("\n\n")
    assert (first, last) == ("Look.", "Write the description in this language: German.")
    lines = [
        TOLD,
        "Warnemünde, Germany",
        "Sunday, 14 July 2019, afternoon",
        "CAFÉ, open daily",
        "At the sea",
    ]
    assert [told.count(line) for line in lines] == [1] * len(lines)
    assert all(context.splitlines())
    assert "54.18" not in told
    assert "invent no names" in context
    assert "Mention the place and the date" in context


def test_nothing_is_left_where_nothing_is_known(asked):
    assert asked("--prompt", "Look.\n", "--context", "all", told={}) == "Look.\n"
    told = asked(
        "--prompt",
        "Look.",
        "--context",
        "people,date",
        told={"localDateTime": "2019-07-14T15:30:00Z"},
    )
    assert "Date: Sunday, 14 July 2019, afternoon\n" in told
    assert "People" not in told
    assert told.count("\n\n") == 1
    assert asked("--prompt", "{{ context }}", "--context", "people", told={}) == PROMPT


@pytest.mark.parametrize(
    ("prompt", "with_facts", "without"),
    [
        ("A.\n{{ people }}\nB.\n", f"A.\n{TOLD}\nB.\n", "A.\nB.\n"),
        ("A.\n\n{{ people }}\n\nB.", f"A.\n\n{TOLD}\n\nB.", "A.\n\nB."),
        ("A.\n{% if people %}\nSee {{ people }}.\n{% endif %}", f"A.\nSee {TOLD}.", "A."),
        ("{{ people }}\nB{% if place %}!{% endif %}", f"{TOLD}\nB!", "B"),
        ("{% for one in people.split(', ') %}<{{ one }}>{% endfor %}", "<Anna {{ 7 * 7 }}>"
         "<Ben (aged 7)>", "<>"),
        ("{% with who = people %}See {{ who }}.{% endwith %}", f"See {TOLD}.", "See ."),
        ("{%+ set who = people %}See {{ who }}.", f"See {TOLD}.", "See ."),
        ("Use {{ language }}.", "Use Serbian.", "Use Serbian."),
    ],
)  # fmt: skip
def test_a_template_is_filled_in(asked, prompt, with_facts, without):
    argv = ["--prompt", prompt, "--description-language", "sr"]
    request = "" if "language" in prompt else "\n\nWrite the description in this language: Serbian."
    for told, text in ((FACTS, with_facts), ({}, without)):
        assert asked(*argv, told=told) == (text.rstrip("\n") if request else text) + request


def test_a_template_may_say_where_the_rest_stands(asked):
    told = asked("--prompt", "{{ place }}.\n\n{{ context }}\n\nB.\n", "--context", "people,place")
    assert told.startswith("Warnemünde, Germany.\n\nThis is known of the photo:\nPeople")
    assert told.endswith("\n\nB.\n")
    assert [told.count(text) for text in (TOLD, "Warnemünde")] == [1, 1]


@pytest.mark.parametrize(
    ("prompt", "begins"),
    [
        ("{% if people %}Name them.{% endif %}", "Name them."),
        ("{# not {{ place }} #}Look.", "Look."),
        ("Say {% raw %}{{ place }}{% endraw %}.", "Say {{ place }}."),
        ("Look{{ ' at the people' }}.", "Look at the people."),
    ],
)
def test_what_a_template_does_not_say_itself_follows_it(asked, prompt, begins):
    told = asked("--prompt", prompt, "--context", "people")
    assert told.startswith(f"{begins}\n\nThis is known")
    assert told.count(TOLD) == 1


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("A\n\n{{ peple }}", 3),
        ("A\n{% if people %}{% if place %}{{ peple }}{% endif %}{% endif %}", 2),
        ("A\n{% if people %}", 2),
        ("A\n{{ 1 / people|length }}", 2),
        ("A\n{{ people.__class__ }}", 2),
        ("A\n{{ 'x' * 10 ** 13 }}", 2),
        ("A\n{{ people|nothing }}", 2),
        ("{% include 'secret' %}", 1),
        ("\n{% for a in range(9) %}{% for b in range(9) %}{% endfor %}{% endfor %}", 2),
        ("\n{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", 2),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_line(config, prompt, line):
    with pytest.raises(ia.Fatal) as caught:
        config("--prompt", prompt)
    assert str(caught.value).startswith(ia.t("bad_template", line=line, why=""))
    assert "\n" not in str(caught.value)


def test_the_prompt_may_be_in_a_file_but_not_also_beside_it(config, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text('"Look" at {{ place }}.\n')
    asked = config("--prompt-file", str(file), environ={"IMMICH_ANALYZE_PROMPT": "Weaker"})
    assert (asked.prompt, asked.context) == ('"Look" at {{ place }}.\n', ("place",))
    named = {"IMMICH_ANALYZE_PROMPT_FILE": str(file)}
    assert config(environ=named) == asked
    assert config("--prompt", "P", environ=named).prompt == "P"
    both = named | {"IMMICH_ANALYZE_PROMPT": "P"}
    for argv, environ in ((["--prompt", "P", "--prompt-file", str(file)], {}), ([], both)):
        with pytest.raises(ia.Fatal):
            config(*argv, environ=environ)


def test_what_shapes_the_answer_makes_another_prompt(config):
    enriched = ["--context", "date,people", "--context", "place,tags,camera,file"]
    made = [
        config("--prompt", "P", *more).prompt_id
        for more in (
            *([], ["--description-language", "de"], ["--context", "date"], enriched),
            *(["--description-language", "German"], ["--enrich-prompt"]),
        )
    ]
    assert made[1] == made[4]
    assert made[3] == made[5]
    assert len(set(made)) == 4


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("GERMAN", "German"),
        ("de-DE", "German"),
        ("pt_BR", "Brazilian Portuguese"),
        ("zh-Hant", "Traditional Chinese"),
        (" ", ""),
        ("Plattdüütsch", "Plattdüütsch"),
    ],
)
def test_a_language_may_be_named_by_its_code(config, said, name):
    assert config("--description-language", said).description_language == name


@pytest.mark.parametrize(
    ("language", "answer", "taken"),
    [
        ("German", GERMAN, True),
        ("German", CHINESE, False),
        ("German", RUSSIAN, False),
        ("German", "一只猫", False),
        ("Brazilian Portuguese", RUSSIAN, False),
        ("German", f"{GERMAN} auf das Schild „{RUSSIAN}, {RUSSIAN}“.", True),
        ("Serbian", GERMAN, True),
        ("Serbian", RUSSIAN, True),
        ("Serbian", CHINESE, False),
        ("Japanese", "東京駅前広場", True),
        ("Japanese", "ソファーの上に猫がいます", True),
        ("Japanese", GERMAN, False),
        ("Chinese", f"{CHINESE}, Samsung Galaxy Note", True),
        ("Russian", "Selfie, 12:45", True),
        ("Hindi", "एक बिल्ली खिड़की पर बैठी है", True),
        ("Klingon", RUSSIAN, True),
        (None, CHINESE, True),
    ],
)
def test_an_answer_in_a_script_of_other_languages_is_none(language, answer, taken):
    if taken:
        assert ia.description_in(answer, language) == answer
    else:
        with pytest.raises(ia.Retryable) as caught:
            ia.description_in(answer, language)
        assert caught.value.key == "answer_foreign"


def test_all_names_of_scripts_are_those_of_unicode():
    letters = "Aя中あアα가عאतबతகকਗગಕകකไລមမאአሀაհᠠ"
    known = {ia.unicodedata.name(letter).split()[0] for letter in letters}
    rows = ia.toml("languages.toml").values()
    assert {script for row in rows for script in row["scripts"]} <= known


@pytest.mark.slow
def test_a_photo_whose_answer_is_in_another_script_is_asked_about_again(api, ollama, command):
    id = api.add(picture=servers.own_picture(0))
    said = iter([CHINESE, "Grau.", GERMAN])  # the second, of a plain picture
    ollama.answer = lambda *_: next(said)
    argv = ["--description-language", "de", "--retry-delay-seconds", "0"]
    done = command(*api.argv, *asking(ollama), *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert api.texts() == {id: GERMAN}
    asked = {chat.json["messages"][0]["content"] for chat in ollama.find(*CHATS)}
    assert asked == {f"{PROMPT}\n\nWrite the description in this language: German."}


@pytest.mark.slow
def test_a_host_that_repeats_itself_is_shown_plain_pictures_with_the_same_words(
    api, ollama, command
):
    photos = [servers.own_picture(number) for number in range(2)]
    for picture in photos:
        api.add(picture=picture)
    ollama.answer = lambda picture, _: "A lake." if picture in photos else "Grey."
    assert command(*api.argv, *asking(ollama)).returncode == 0
    asked = [chat.json["messages"][0]["content"] for chat in ollama.find(*CHATS)]
    assert asked == [PROMPT] * 3


@pytest.mark.slow
def test_the_question_is_shown_and_nothing_is_asked_or_written(library, ollama, command):
    id, before = library.add(picture=servers.own_picture(0)), library.state()
    argv = [*library.argv, *asking(ollama), "--prompt", "Look.", "--description-language", "ru"]
    for named in (id, f"https://photos.example.org/albums/{id[::-1]}/photos/{id}"):
        done = command(*argv, "--show-prompt", named)
        asked = "Look.\n\nWrite the description in this language: Russian.\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, asked, "")
    strange = id[:-1] + ("1" if id[-1] == "0" else "0")
    no_id = f"--show-prompt: {ia.t('not_an_id', value='x/y')}"
    for named, why in ((strange, ia.t("unknown_photo", photo=strange)), ("x/y", no_id)):
        done = command(*argv, "--show-prompt", named)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{why}\n")
    assert ollama.find(*CHATS) == []
    assert library.state() == before
    assert library.writes() == []


@pytest.mark.slow
def test_a_question_is_shown_by_a_key_with_the_least_rights_without_an_update(ollama, command):
    keys = {"key": servers.FakeKey("alice", ia.NEEDED_PERMISSIONS)}
    with servers.FakeImmich("3.1.0", keys) as server:
        world = ApiWorld(server)
        id = world.add(picture=servers.own_picture(0))
        done = command(*world.argv, *asking(ollama), "--prompt", "Look.", "--show-prompt", id)
        assert (done.returncode, done.stdout) == (0, "Look.\n")
        assert server.count("PUT|POST|DELETE", "") == 0
    server.check()


def test_a_template_that_fails_for_one_photo_fails_that_photo_with_its_line(
    command, library, ollama
):
    for number, city in enumerate(("Oslo", "Rostock")):
        library.add(picture=servers.own_picture(number), place=(city, "", ""))
    with pytest.raises(ZeroDivisionError) as raised:  # in the words of this Python
        _ = 1 // len("")
    prompt = "Look.\n{{ 1 // (place | length - 4) }}"
    argv = [*library.argv, *asking(ollama)]
    done = command(*argv, "--prompt", prompt)
    assert done.returncode == 1
    assert ia.t("bad_template", line=2, why=raised.value) in done.stderr
    assert "Traceback" not in done.stderr
    assert len(ollama.find(*CHATS)) == 1
