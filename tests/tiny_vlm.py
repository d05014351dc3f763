"""Write a tiny vision model that llama.cpp serves and whose answers are known in advance.

No weights of a real vision model can be had from a package registry, so these are set by hand:

  vision   Idefics3/SmolVLM layout: a convolution averages each patch to its red, green and blue,
           an empty transformer block, a pixel shuffle, a projection.
  text     Llama layout, one block: its only attention head averages the colour of all image
           tokens; its output layer is a table of which word follows which, and a nearest-colour
           classifier on that average chooses the words for colour and brightness.

A red picture gives "A photo dominated by red tones with even lighting.", no picture gives "There
is no image to describe.", and a JSON schema is filled with the same words. An answer therefore
proves which picture the server was shown. Same arguments, same bytes.

    python tests/tiny_vlm.py FOLDER
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf
import numpy as np

# name and sRGB in 0..1: the classifier answers with the nearest one
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.80),
    "yellow": (0.92, 0.85, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "purple": (0.50, 0.15, 0.65),
    "pink": (0.95, 0.55, 0.75),
    "cyan": (0.15, 0.80, 0.85),
    "brown": (0.45, 0.28, 0.15),
    "white": (0.93, 0.93, 0.93),
    "silver": (0.72, 0.72, 0.72),
    "gray": (0.47, 0.47, 0.47),
    "charcoal": (0.25, 0.25, 0.25),
    "black": (0.06, 0.06, 0.06),
}
BRIGHTNESS = {"dark": (0.12,) * 3, "even": (0.45,) * 3, "bright": (0.85,) * 3}
BLIND = "There is no image to describe."

CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|assistant|>",
    "<|user|>",
    "<|system|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
]
THINK_TOKENS = ["<think>", "</think>"]

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}PAST"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif p.type == 'media_marker' or p.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}TAIL{% endif %}"
)
# What llama.cpp looks for in a template before it calls a model one that reasons.
THINK_PAST = (
    "{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
)
THINK_TAIL = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)

# What each number of the hidden state means.
ALWAYS, IS_IMAGE, RGB, MEAN_RGB, SEEN_IMAGE, TOKEN = 0, 1, 2, 5, 8, 9
WIDTH, HEAD, FEED_FORWARD = 384, 32, 32
CONST, MARK = 8.0, 4.0  # size of the always-on number and of a token's own number
SURE = 60.0  # logit of the word that must follow; grammars may force a lesser one

TILE, PATCH, MERGE, VISION_WIDTH = 64, 16, 2, 16

Arcs = dict[int, dict[int, float]]


def answer(rgb: Sequence[float]) -> str:
    """Return what the model says of a picture whose mean colour is `rgb` (0..1)."""

    def nearest(table: dict[str, tuple[float, ...]]) -> str:
        return min(table, key=lambda name: math.dist(table[name], rgb))

    return f"A photo dominated by {nearest(COLOURS)} tones with {nearest(BRIGHTNESS)} lighting."


class Vocabulary:
    """Words and their numbers; a word gets its number when it is first asked for."""

    def __init__(self, control: Iterable[str], user_defined: Iterable[str]) -> None:
        self.text: list[str] = []
        self.kind: list[int] = []
        self._byte_names = byte_names()
        self._literal = {*control, *user_defined}
        for word in control:
            self._add(word, gguf.TokenType.CONTROL)
        for word in user_defined:
            self._add(word, gguf.TokenType.USER_DEFINED)
        for name in self._byte_names:
            self._add(name, gguf.TokenType.NORMAL)
        self.number("\n\n")

    def _add(self, text: str, kind: gguf.TokenType) -> int:
        self.text.append(text)
        self.kind.append(int(kind))
        return len(self.text) - 1

    def encode(self, word: str) -> str:
        """Spell a word as GPT-2 tokenizers do, every byte as a printable character."""
        return "".join(self._byte_names[byte] for byte in word.encode())

    def number(self, word: str) -> int:
        text = word if word in self._literal else self.encode(word)
        if text in self.text:
            return self.text.index(text)
        return self._add(text, gguf.TokenType.NORMAL)

    def numbers(self, words: Iterable[str]) -> list[int]:
        return [self.number(word) for word in words]


def byte_names() -> list[str]:
    """Return GPT-2's printable stand-in for each byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = map(chr, range(256, 512))
    return [chr(byte) if byte in printable else next(stand_ins) for byte in range(256)]


class Grammar:
    """Which word follows which, and how strongly."""

    def __init__(self, words: Vocabulary, *, think: bool, endless: bool) -> None:
        self.words = words
        self.arcs: Arcs = {}
        self._sentences(endless=endless)
        self._json()
        self._opening("<|assistant|>", think=think)

    def _arc(self, word: str, *following: tuple[str, float]) -> None:
        row = self.arcs.setdefault(self.words.number(word), {})
        for follower, weight in following:
            row[self.words.number(follower)] = weight

    def _chain(self, *words: str) -> None:
        for word, follower in itertools.pairwise(words):
            self._arc(word, (follower, SURE))

    def _begin(self, word: str) -> None:
        """Let a sentence begin after this word; whether an image was seen decides which."""
        self._arc(word, ("A", SURE), ("There", SURE))

    def _sentences(self, *, endless: bool) -> None:
        self._chain("A", " photo", " dominated", " by")
        for colour in COLOURS:
            self._chain(" by", f" {colour}", " tones")
        self._chain(" tones", " with")
        for brightness in BRIGHTNESS:
            self._chain(" with", f" {brightness}", " lighting")
        self._chain(" lighting", ".")
        self._chain("There", " is", " no", " image", " to", " describe", ".")
        self._arc(".", (" " if endless else "<|im_end|>", SURE), ('"', 40))
        self._begin(" ")

    def _json(self) -> None:
        """Add what is only reached where a JSON schema forbids the plain sentence."""
        self._begin('"')
        self._arc("{", ('"', SURE), ("}", 30))
        self._arc('"', (":", 45), ("]", 42), ("}", 41), (",", 40))
        self._arc(
            ":", ('"', SURE), ('["', 55), ("[", 50), ("{", 45), ("5", 40), ("t", 35), ("n", 34)
        )
        self._arc(",", ('"', SURE))
        self._arc("[", ('"', SURE), ("]", 30))
        self._arc("}", ("<|im_end|>", SURE), ("}", 40), ("]", 39), (",", 38))
        self._arc("]", ("}", SURE), (",", 59), ("<|im_end|>", 58), ("]", 57))
        for colour in COLOURS:
            self._arc('["', (colour, SURE))
            self._arc(colour, ('","', SURE), ('"', 50))
        for brightness in BRIGHTNESS:
            self._arc('","', (brightness, SURE))
            self._arc(brightness, ('"', SURE))
        for digit in "0123456789":
            self._arc(digit, ("<|im_end|>", 61), ("}", SURE), (",", 59), ("]", 58))

    def _opening(self, start: str, *, think: bool) -> None:
        if think:
            self._chain(start, "<think>", "The", " user", " wants", " a", " description")
            self._chain(" description", "</think>")
            for word in ("</think>", "\n\n"):
                self._begin(word)
            for word in ("<think>", "</think>"):
                self._arc(word, ("{", 25))
        else:
            self._begin(start)
        self._arc(start, ("{", 25))


def output_table(words: Vocabulary, arcs: Arcs) -> np.ndarray:
    """Turn arcs and classifiers into the output layer, one row for each word."""
    table = np.zeros((len(words.text), WIDTH), np.float32)
    lost = {"<|im_end|>": 30.0, '"': 25.0, "}": 24.0, "]": 23.0, ",": 22.0}
    fallback = {words.number(word): weight for word, weight in lost.items()}
    for word in range(len(words.text)):
        for follower, weight in (arcs.get(word) or fallback).items():
            table[follower, TOKEN + word] = weight / MARK
    for prefix, colours_after, brightness_after in ((" ", " by", " with"), ("", '["', '","')):
        classify(table, words, COLOURS, prefix, colours_after)
        classify(table, words, BRIGHTNESS, prefix, brightness_after)
    for word, sign in (("A", 1), ("There", -1)):
        row = table[words.number(word)]
        row[SEEN_IMAGE] += sign * 30
        row[ALWAYS] -= sign * 15 / CONST
    return table


def classify(
    table: np.ndarray,
    words: Vocabulary,
    centres: dict[str, tuple[float, ...]],
    prefix: str,
    opener: str,
) -> None:
    """Let the mean colour choose among words; they are shut unless `opener` came before."""
    gate, sharpness = 2000.0, 400.0
    for name, colour in centres.items():
        centre = np.array(colour, np.float32) * 2 - 1  # pixels arrive as -1..1
        row = table[words.number(prefix + name)]
        row[MEAN_RGB : MEAN_RGB + 3] += sharpness * centre
        row[ALWAYS] += (-sharpness * float(centre @ centre) / 2 - gate) / CONST
        row[TOKEN + words.number(opener)] += gate / MARK


def text_tensors(words: Vocabulary, arcs: Arcs) -> dict[str, np.ndarray]:
    """Return the weights of the language half."""
    size = len(words.text)
    assert TOKEN + size <= WIDTH, f"{size} words do not fit into {WIDTH} numbers"
    embedding = np.zeros((size, WIDTH), np.float32)
    embedding[:, ALWAYS] = CONST
    embedding[np.arange(size), TOKEN + np.arange(size)] = MARK

    query, key, value = (np.zeros((HEAD, WIDTH), np.float32) for _ in range(3))
    merged = np.zeros((WIDTH, HEAD), np.float32)
    query[0, ALWAYS] = 3.0  # every token asks the same question ...
    key[0, IS_IMAGE] = 3.0  # ... and only image tokens answer it
    for channel in range(3):
        value[channel, RGB + channel] = 1.0
        merged[MEAN_RGB + channel, channel] = 1.0
    value[3, IS_IMAGE] = 1.0 / MARK
    merged[SEEN_IMAGE, 3] = 1.0

    rms = math.sqrt((CONST**2 + MARK**2 + 1.0) / WIDTH)  # the norm layers divide by this
    norm = np.full(WIDTH, rms, np.float32)
    wide = np.zeros((FEED_FORWARD, WIDTH), np.float32)
    return {
        "token_embd.weight": embedding,
        "output_norm.weight": norm,
        "output.weight": output_table(words, arcs),
        # No rotation by position: the order is in the words.
        "rope_freqs.weight": np.full(HEAD // 2, 1e9, np.float32),
        "blk.0.attn_norm.weight": norm,
        "blk.0.attn_q.weight": query,
        "blk.0.attn_k.weight": key,
        "blk.0.attn_v.weight": value,
        "blk.0.attn_output.weight": merged,
        "blk.0.ffn_norm.weight": norm,
        "blk.0.ffn_gate.weight": wide,
        "blk.0.ffn_up.weight": wide,
        "blk.0.ffn_down.weight": wide.T.copy(),
    }


def vision_tensors() -> dict[str, np.ndarray]:
    """Return the weights of the half that turns a picture into image tokens."""
    kernel = np.zeros((VISION_WIDTH, 3, PATCH, PATCH), np.float32)
    for channel in range(3):
        kernel[channel, channel] = 1.0 / PATCH**2
    bias = np.zeros(VISION_WIDTH, np.float32)
    bias[3] = 1.0  # the number by which the language half knows an image token
    projection = np.zeros((WIDTH, VISION_WIDTH * MERGE**2), np.float32)
    for first in range(0, VISION_WIDTH * MERGE**2, VISION_WIDTH):
        for channel in range(3):
            projection[RGB + channel, first + channel] = 1.0 / MERGE**2
        projection[ALWAYS, first + 3] = CONST / MERGE**2
        projection[IS_IMAGE, first + 3] = MARK / MERGE**2

    tensors = {
        "v.patch_embd.weight": kernel,
        "v.patch_embd.bias": bias,
        "v.position_embd.weight": np.zeros(((TILE // PATCH) ** 2, VISION_WIDTH), np.float32),
        "mm.model.fc.weight": projection,
    }
    for layer in ("ln1", "ln2"):
        tensors[f"v.blk.0.{layer}.weight"] = np.ones(VISION_WIDTH, np.float32)
        tensors[f"v.blk.0.{layer}.bias"] = np.zeros(VISION_WIDTH, np.float32)
    for layer in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
        tensors[f"v.blk.0.{layer}.weight"] = np.zeros((VISION_WIDTH, VISION_WIDTH), np.float32)
        tensors[f"v.blk.0.{layer}.bias"] = np.zeros(VISION_WIDTH, np.float32)
    return tensors


def describe_text(writer: gguf.GGUFWriter, words: Vocabulary, *, think: bool) -> None:
    """Say in the file's header how the language half is built and what its words are."""
    writer.add_context_length(32768)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words.text))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words.text)
    writer.add_token_types(words.kind)
    writer.add_token_merges([f"{words.encode(chr(10))} {words.encode(chr(10))}"])
    writer.add_bos_token_id(words.number("<|im_start|>"))
    writer.add_eos_token_id(words.number("<|im_end|>"))
    writer.add_pad_token_id(words.number("<|endoftext|>"))
    writer.add_add_bos_token(True)
    template = TEMPLATE.replace("PAST", THINK_PAST if think else "")
    writer.add_chat_template(template.replace("TAIL", THINK_TAIL if think else ""))


def describe_vision(writer: gguf.GGUFWriter, edge: int) -> None:
    """Say in the file's header how the vision half is built."""
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "idefics3")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": TILE,
        "patch_size": PATCH,
        "preproc_image_size": edge,
        "embedding_length": VISION_WIDTH,
        "feed_forward_length": VISION_WIDTH,
        "block_count": 1,
        "attention.head_count": 1,
        "projection_dim": WIDTH,
        "projector.scale_factor": MERGE,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])


def finish(writer: gguf.GGUFWriter, name: str, tensors: dict[str, np.ndarray]) -> None:
    writer.add_name(f"{name} (hand-set weights, for tests)")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    folder: Path,
    name: str = "tiny-vlm",
    *,
    think: bool = False,
    endless: bool = False,
    edge: int = 128,
) -> tuple[Path, Path]:
    """Write the model and its vision projector; return both paths.

    `think` puts a <think> block before the answer, `endless` says the sentence again and again
    until a limit ends it, and `edge` is the longest side a picture is scaled to: with 512 one
    picture takes about 880 tokens instead of 100.
    """
    model, mmproj = folder / f"{name}.gguf", folder / f"{name}-mmproj.gguf"
    words = Vocabulary(CONTROL_TOKENS, THINK_TOKENS if think else [])
    arcs = Grammar(words, think=think, endless=endless).arcs
    writer = gguf.GGUFWriter(str(model), "llama")
    describe_text(writer, words, think=think)
    finish(writer, name, text_tensors(words, arcs))
    writer = gguf.GGUFWriter(str(mmproj), "clip")
    describe_vision(writer, edge)
    finish(writer, f"{name} vision", vision_tensors())
    return model, mmproj


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the two files")
    parser.add_argument("--name", default="tiny-vlm")
    parser.add_argument("--think", action="store_true", help="answer after a <think> block")
    parser.add_argument("--endless", action="store_true", help="never stop by itself")
    parser.add_argument("--edge", type=int, default=128, help="longest side of a picture, pixels")
    options = vars(parser.parse_args())
    options["folder"].mkdir(parents=True, exist_ok=True)
    for path in write_model(**options):
        print(path)


if __name__ == "__main__":
    main()
