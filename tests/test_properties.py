"""Whose text it is, over texts that nobody would think of.

A person's words survive whatever the tool, a model and other persons do, and what the tool
added can be taken back to the byte.
"""

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import hypothesis.configuration
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import immich_analyze as ia

pytestmark = pytest.mark.slow

hypothesis.configuration.set_hypothesis_home_dir(tempfile.gettempdir() + "/hypothesis")

TIMES = int(os.environ.get("EXAMPLES", "1"))  # as many examples


def property_of(max_examples: int = 40) -> settings:
    """`make faults` tries six times as many examples."""
    return settings(
        derandomize=True,
        deadline=None,
        max_examples=TIMES * max_examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


AT = datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=UTC)
JS_BLANKS = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(
    map(chr, range(0x2000, 0x200B))
)


# --- Texts -----------------------------------------------------------------------------------

TAGS = [
    *("[AI]", "[/AI]", "[AI]\n", "\n[/AI]", "[AI]\r\n", "\r\n[/AI]\r\n", "[AI] \t\n", "[/AI]  "),
    *(" [AI]", "x[AI]", "[AI]x", "[ai]", "\\[AI]", "[AI][/AI]", "[AI]\n[AI]\n", "[/AI]\n[/AI]\n"),
    *("[AI]\u00a0\n", "[/AI]\u2028", "\ufeff[AI]\n", "[AI]\x1c\n", "[AI]\nold\n[/AI]", "(AI)"),
    *("\n[AI]\n\n[/AI]\n", "[AI]\nold\r\n[/AI] \r\n", "\n\n[AI]\n$1\n[/AI]\n\n"),
]
SNAGS = [
    *("\n", "\n\n", "\n\n\n", "\r\n", "\r", "\t", " ", "  \n ", "\u2028", "\x85", "\x0c", "\ufeff"),
    *("$1", r"\1", r"\g<0>", "%s", "%(id)s", "{0}", "{text}", "'; --", "<b>&amp;</b>", "1.50"),
    *("👩‍👩‍👧‍👦", "🏖️🇺🇦", "שלום\u200f", "لافتة", "\u202eabc\u202c", "e\u0301", "Ещё", "caption"),
]
LONG = "Ещё одна фраза $1. " * 3600  # more than 100 kB
LONG_ANSWER = " ".join(map(str, range(18_000)))  # which does not repeat itself
kept_by_postgres = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
pieces = st.sampled_from(TAGS) | st.sampled_from(SNAGS) | st.text(kept_by_postgres, max_size=6)
humans = st.lists(pieces, max_size=9).map("".join)
blanks = st.text("\n\r\t \u00a0\u2028\ufeff", max_size=5)
texts = humans | blanks

nasty = st.sampled_from(["\0", "\ud800", "\udc00[AI]", "\0[/AI]\0", "<think>[AI]</think>", '"'])
spoken = st.lists(nasty | pieces | st.text(max_size=6), max_size=9).map("".join)


def heard(raw: str) -> str:
    """What is left of a model's answer, "" for nothing to store."""
    try:
        return ia.description_in(raw)
    except ia.Retryable:
        return ""


raw_answers = spoken | st.tuples(spoken, spoken).map(" a red boat ".join)
answers = raw_answers.map(heard).filter(bool)


# --- A second opinion on blocks, line by line ------------------------------------------------


def split(text: str) -> list[str]:
    """The text as outside, block, outside, block, …, outside."""
    found, opened, at, done = [], None, 0, 0
    for line in text.split("\n"):
        if line.rstrip() == "[AI]":
            opened = at
        elif line.rstrip() == "[/AI]" and opened is not None:
            found += [text[done:opened], text[opened : at + len(line)]]
            opened, done = None, at + len(line)
        at += len(line) + 1
    return [*found, text[done:]]


def outside(text: str) -> str:
    return "".join(split(text)[::2])


def blocks(text: str) -> list[str]:
    return split(text)[1::2]


def without_lines(text: str) -> str:
    return text.replace("\n", "")


@property_of(80)
@given(texts)
def test_what_a_block_is_can_be_told_line_by_line(text):
    assert [match[0] for match in ia.BLOCK.finditer(text)] == blocks(text)
    assert "".join(split(text)) == text


# --- Settings and photos ---------------------------------------------------------------------

POLICIES = [
    *(("none", False), ("none", True), ("missing-ai", True)),
    *(("outdated", False), ("outdated", True), ("all", False), ("all", True)),
]
policies = st.sampled_from(POLICIES)
keeping = st.sampled_from([(policy, preserve) for policy, preserve in POLICIES if preserve])


@functools.cache
def asked(policy: str, preserve: bool, model: str = "tiny-vlm") -> ia.Config:
    more = ["--preserve-human"] if preserve else []
    return ia.parse(["--overwrite-policy", policy, "--model-name", model, *more], {})


def photo(text: str, note: ia.Note | None = None) -> ia.Photo:
    return ia.Photo("id", "photo.jpg", text, "0", note=note)


def noted(text: str, config: ia.Config) -> ia.Note:
    return ia.Note(config.model_name, config.prompt_id, text=ia.text_id(text))


# --- One merge -------------------------------------------------------------------------------


@property_of()
@given(texts, answers, keeping)
@example("[AI]", "A boat.", ("missing-ai", True))
@example("[AI]\nold\n[/AI]\n[AI]\n[AI]\nold\n[/AI]\n[/AI]", "A boat.", ("all", True))
def test_outside_the_block_nothing_changes(text, answer, policy):
    merged = ia.merge(photo(text), answer, asked(*policy))
    block = f"[AI]\n{answer}\n[/AI]"
    assert blocks(merged)[0] == block
    if blocks(text):
        assert outside(merged) == outside(text)
        assert split(merged)[0] == split(text)[0]  # in place
        assert len(blocks(merged)) <= len(blocks(text))
    else:
        assert merged == (text and text + "\n\n") + block


@property_of()
@given(st.lists(humans.filter(lambda text: not re.search(r"\[/?AI\]", text)), max_size=4), answers)
def test_several_blocks_become_one(captions, answer):
    text = "\n[AI]\nold\n[/AI]\n".join(["before", *captions, "after"])
    merged = ia.merge(photo(text), answer, asked("missing-ai", True))
    assert blocks(merged) == [f"[AI]\n{answer}\n[/AI]"]
    assert outside(merged) == outside(text)


@property_of()
@given(texts, answers, policies)
def test_merging_twice_is_merging_once(text, answer, policy):
    config = asked(*policy)
    once = ia.merge(photo(text), answer, config)
    assert ia.merge(photo(once), answer, config) == once
    assert ia.merge(photo(once, noted(once, config)), answer, config) == once


@property_of()
@given(texts, answers, answers, keeping)
def test_another_answer_changes_only_the_block(text, answer, other, policy):
    config = asked(*policy)
    first = ia.merge(photo(text), answer, config)
    second = ia.merge(photo(first, noted(first, config)), other, config)
    assert second == ia.merge(photo(text), other, config)


@property_of()
@given(texts, answers, keeping)
def test_undo_gives_the_text_from_before(text, answer, policy):
    assume(not blocks(text))
    config = asked(*policy)
    merged = ia.merge(photo(text), answer, config)
    assert ia.unmerge(photo(merged, noted(merged, config))) == text
    assert ia.unmerge(photo(merged)) == text  # also without the note


@property_of(10)
@given(texts, texts, spoken, spoken, keeping)
def test_100_kb_are_no_more_trouble_than_a_word(before, after, first, last, policy):
    text, answer = before + LONG + after, heard(first + LONG_ANSWER + last)
    assume(not blocks(text) and answer)
    config = asked(*policy)
    merged = ia.merge(photo(text), answer, config)
    assert merged == f"{text}\n\n[AI]\n{answer}\n[/AI]"
    assert len(merged.encode()) > 200_000
    assert ia.merge(photo(merged), answer, config) == merged
    assert ia.unmerge(photo(merged)) == text


@pytest.mark.parametrize(
    "text",
    ["[AI]\n" * 20_000, "[AI]" + " " * 100_000, "[/AI]\n" * 17_000, "[AI]\nx\n[/AI]\n" * 7000],
    ids=["opened", "blanks", "closed", "blocks"],
)
def test_no_text_of_100_kb_takes_long_to_look_through(text):
    merged = ia.merge(photo(text), "A boat.", asked("missing-ai", True))
    assert ia.merge(photo(merged), "A boat.", asked("missing-ai", True)) == merged
    assert ia.unmerge(photo(merged)) != merged  # after 0.1 s; or hours


around = st.sampled_from(["", "\n", "\n\n", "\n\n\n", "\r\n", "x\n", "\nx"])
parts = st.tuples(humans, around, st.just("[AI]\nold\n[/AI]"), around, humans)


@property_of()
@given(parts.map("".join).filter(lambda text: len(blocks(text)) == 1), answers, keeping)
def test_undo_after_renewing_a_block_is_undo_before(text, answer, policy):
    merged = ia.merge(photo(text), answer, asked(*policy))
    assert ia.unmerge(photo(merged)) == ia.unmerge(photo(text))


@property_of()
@given(texts)
def test_undo_takes_only_blocks_and_lines_around_them(text):
    left = ia.unmerge(photo(text))
    if blocks(text):
        assert without_lines(left) == without_lines(outside(text))
    else:
        assert left == text


@property_of()
@given(texts, texts)
def test_undo_takes_a_bare_text_only_if_it_is_to_the_letter_the_noted_one(text, stored):
    assume(text and not blocks(text))
    note = noted(stored, asked("none", False))
    assert ia.unmerge(photo(text, note)) == ("" if text == stored else text)


# --- Whose text it is ------------------------------------------------------------------------


@property_of()
@given(texts, texts, policies, st.booleans())
def test_a_persons_text_is_sent_to_no_model_unless_it_was_asked_for(text, other, policy, preserve):
    assume(text.strip() and text != other and not blocks(text))
    notes = [None, noted(other, asked("none", False, "other-model"))]
    for note in notes:
        wanted = not ia.left_alone(photo(text, note), asked(*policy))
        assert wanted == (policy[0] in ("missing-ai", "all"))


@property_of()
@given(texts, answers, policies)
def test_what_was_described_just_now_is_described_again_only_by_all(text, answer, policy):
    config = asked(*policy)
    merged = ia.merge(photo(text), answer, config)
    wanted = not ia.left_alone(photo(merged, noted(merged, config)), config)
    assert wanted == (policy[0] == "all")


# --- What a model says -----------------------------------------------------------------------


@property_of(80)
@given(raw_answers)
def test_no_answer_can_open_or_close_a_block_or_break_a_library(raw):
    said = ia.clean(raw)
    assert not [line for line in said.split("\n") if re.match(r"\[/?AI\]", line)]
    assert said == said.strip()
    assert said.encode().decode() == said
    assert not set(said) & set("\0\r\ufeff")
    if text := heard(raw):
        assert text == said
        assert blocks(ia.merge(photo(""), text, asked("none", True))) == [f"[AI]\n{text}\n[/AI]"]


# --- Notes -----------------------------------------------------------------------------------

words = st.text(max_size=20)
notes = st.builds(ia.Note, words, words, text=words, was=words) | st.builds(
    ia.Note, words, words, text=words, failed=words.filter(bool), why=words, tries=st.integers(1, 9)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@property_of()
@given(notes)
def test_a_note_is_read_as_it_was_written(note):
    value = json.loads(json.dumps(note.value(AT)))
    assert value["at"] == "2026-01-02T03:04:05.678Z"
    assert ia.note_in(value) == note


@property_of()
@given(notes, st.integers(0, 9), json_values)
@example(ia.Note("model", "prompt"), 0, 2)  # of a later version
def test_a_note_with_a_field_of_another_type_is_no_note_of_ours(note, place, value):
    whole = note.value(AT)
    name = list(whole)[place % len(whole)]
    assume(type(value) is not type(whole[name]) or (name == "v" and value != 1))
    assert ia.note_in(whole | {name: value}) is None


@property_of()
@given(json_values)
def test_other_json_is_no_note(value):
    assert ia.note_in(value) is None


# --- The story of a photo --------------------------------------------------------------------


Edits = Sequence[tuple[float, str]]
UNDO = ia.parse(["--undo"], {})


class Hasty(ia.Stop):
    """A stop event that lets nobody wait."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


class Story:
    """One photo, and a person who writes to it; a library to the tool, which reads it back."""

    def __init__(self, text: str, through_files: bool) -> None:
        self.note: ia.Note | None = None
        self.must_confirm = through_files  # as in API mode, where Immich trims
        self.text = self._kept(text)
        self.words = self._spoken_outside()
        self._number = 0

    def look(self, _: ia.Photo | None = None) -> ia.Photo:
        return photo(self.text, self.note)

    def write(self, found: ia.Photo, text: str, note: ia.Note | None) -> bool:
        if self.text not in (found.description, text):
            return False
        self.text, self.note = self._kept(text), note
        return True

    def read_back(self, photos: list[ia.Photo], age: float) -> dict[str, str]:
        return {found.id: self.text for found in photos}

    def remember(self, _: ia.Photo, note: ia.Note | None) -> None:
        self.note = note

    def close(self) -> None:
        pass

    def _kept(self, text: str) -> str:
        return text.strip(JS_BLANKS) if self.must_confirm else text

    def _spoken_outside(self) -> list[str]:
        return re.findall(r"\bperson\d+\b", outside(self.text))

    def describe(self, answer: str, config: ia.Config, meanwhile: Edits = ()) -> bool:
        """Let the tool have a look, and people write before it does; whether it wrote."""
        found = self.look()
        if ia.left_alone(found, config):
            return False
        for place, gap in meanwhile:
            self.edit(place, gap)
        said = ia.Said(answer, 2.0, 5)
        return self._tell(lambda run: ia.store(found, said, self, run), config)

    def undo(self) -> bool:
        """Let the tool take back what is its own; whether it wrote."""
        return self._tell(lambda run: ia.take_back(self.look(), self, run), UNDO)

    def _tell(self, story: Callable[[ia.Run], Any], config: ia.Config) -> bool:
        stop = Hasty()
        patience, tally = ia.Patience(stop, 0, 0), ia.Tally()
        run = ia.Run(config, stop, None, patience, tally, lambda: self)
        ending = ia.attempt(self.look(), story, run)
        assert not ending.error or ending.error.key == "has_description"
        if self.must_confirm and not ending.error:
            run.checks.written.put(ending)
        run.checks.written.put(None)
        ia.check_written(run)
        assert not tally.counts  # nothing was taken off: what was written was kept
        return not ending.error

    def edit(self, place: float, gap: str) -> None:
        """Let a person write a word somewhere outside the block."""
        parts, offsets, at = split(self.text), [], 0
        for number, part in enumerate(parts):
            offsets += range(at, at + len(part) + 1) if number % 2 == 0 else []
            at += len(part)
        near = (self.text[max(0, offset - 1) : offset + 1] for offset in offsets)
        free = [o for o, two in zip(offsets, near, strict=True) if not two.isalnum() or not two[1:]]
        offset = free[int(place * (len(free) - 1))]
        self._number += 1
        word = f"{gap}person{self._number}{gap}"
        self.text = self._kept(self.text[:offset] + word + self.text[offset:])
        self.words = self._spoken_outside()
        assert f"person{self._number}" in self.text

    def check(self) -> None:
        """No word of a person is lost, and none is there twice."""
        spoken = re.findall(r"\bperson\d+\b", self.text)
        assert sorted(w for w in spoken if w in self.words) == sorted(self.words)


edit = st.tuples(st.floats(0, 1), st.sampled_from([" ", "\n", "\r\n"]))
edits, typed = st.lists(edit, max_size=2), st.lists(edit, min_size=1, max_size=2)
starts = st.tuples(texts, st.sampled_from(["", "\nperson0\n", " person0 "]), texts).map("".join)


@property_of(80)
@given(starts, st.booleans(), answers, edits, answers, edits, policies, policies)
@example("person0", True, "A boat.", [], "A ship.", [], ("missing-ai", True), ("outdated", False))
@example("", False, "A boat.", [(1.0, "\n")], "A ship.", [], ("none", False), ("missing-ai", True))
def test_no_word_of_a_person_is_ever_lost(start, files, answer, early, other, late, first, second):
    story = Story(start, files)
    for said, changes, policy, model in (
        (answer, early, first, "tiny-vlm"),
        (other, late, second, "other-model"),
    ):
        wrote = story.describe(said, asked(*policy, model))
        if wrote and policy == ("all", False):
            story.words = []  # which is what was asked for
        story.check()
        for place, gap in changes:
            story.edit(place, gap)
    story.undo()
    story.check()


@property_of()
@given(starts, st.booleans(), answers, answers, typed, policies, policies)
def test_what_a_person_types_meanwhile_is_never_lost(
    start, files, answer, other, meanwhile, first, second
):
    story = Story(start, files)
    if story.describe(answer, asked(*first)) and first == ("all", False):
        story.words = []
    wrote = story.describe(other, asked(*second, "other-model"), meanwhile)
    assert not wrote or second[1]  # who keeps no person's text leaves the photo alone
    story.check()
    story.undo()
    story.check()


@property_of()
@given(starts, st.booleans(), answers, answers, policies, policies)
def test_undo_after_two_models_gives_the_text_from_before(
    start, files, answer, other, first, second
):
    story = Story(start, files)
    assume(not blocks(story.text) and ("all", False) not in (first, second))
    before = story.text
    wrote = story.describe(answer, asked(*first))
    wrote = story.describe(other, asked(*second, "other-model")) or wrote
    story.undo()
    blank = wrote and not before.strip()  # counts as none, and need not come back
    assert story.text == before or (blank and not story.text.strip())


@property_of()
@given(starts, st.booleans(), answers, policies)
@example("\ufeffperson0", True, "A boat.", ("missing-ai", True))
def test_a_note_is_true_and_a_second_run_does_nothing(start, files, answer, policy):
    story = Story(start, files)
    config = asked(*policy)
    assume(story.describe(answer, config))
    assert story.note == noted(story.text, config)
    text = story.text
    assert story.describe(answer, config) == (policy[0] == "all")
    assert story.text == text


@pytest.mark.parametrize("tag", ["[AI]", "[/AI]", "[AI] ", "[/AI]\t", "[AI]x", "[AI]\r"])
def test_a_tag_of_a_models_own_is_defused_and_still_readable(tag):
    said = ia.description_in(f"A sign.\n{tag}\nIt reads so.")
    assert said == f"A sign.\n{tag.strip().replace('[', '(').replace(']', ')')}\nIt reads so." or (
        said == f"A sign.\n{tag.replace('[', '(').replace(']', ')')}\nIt reads so."
    )
