"""A real, small T5 tokenizer, made offline: what a tiny Wan folder ships in ``tokenizer/``.

UMT5 uses a Unigram vocabulary with ``<pad>`` 0, ``</s>`` 1 and no beginning-of-sequence token; so does this one.
The files are written by hand rather than by ``save_pretrained``, because the class names that transformers writes
differ between its versions 4 and 5, while ``T5Tokenizer`` opens in both.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_SPECIAL = ("<pad>", "</s>", "<unk>")
_SUBJECTS = ("a red ball", "a blue square", "a green triangle", "a yellow star", "a white cat", "a small boat")
_MOTIONS = ("rolls", "slides", "turns", "bounces", "swims", "drifts", "rises", "falls")
_PLACES = ("to the left", "to the right", "on a dark table", "over the sea", "in the snow", "under warm light")
_OTHER = (
    "A tracking shot, 4k, cinematic; the camera moves slowly (16 fps) & stops!",
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "一只白猫在草地上奔跑，镜头缓慢推进。",
    "红色的球在桌子上滚动，画面清晰，光线柔和。",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，低质量",
)


def corpus() -> list[str]:
    """Return the sentences that the tokenizer is made from: the demo's captions and a little of everything."""
    sentences = [f"{s} {m} {p}." for s in _SUBJECTS for m in _MOTIONS for p in _PLACES]
    return [*sentences, *_OTHER]


def _vocabulary(vocab_size: int, sentences: Sequence[str]) -> list[tuple[str, float]]:
    """Return tokens with their log probabilities: every character, then the words by how often they occur.

    The trainer of ``tokenizers`` breaks ties by the order of a hash map, which is new in each process; a folder
    must not change from run to run, so the counting is done here.
    """
    words = Counter(f"▁{word}" for line in sentences for word in unicodedata.normalize("NFKC", line).split())
    characters = Counter(letter for word, count in words.items() for letter in word * count)
    for code in range(33, 127):
        characters[chr(code)] += 1
    total = sum(characters.values()) + sum(words.values())
    room = max(0, vocab_size - len(_SPECIAL) - len(characters))
    by_count = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:room]
    learned = sorted(characters.items(), key=lambda item: (-item[1], item[0])) + by_count
    tokens = {token: math.log(count / total) for token, count in learned}
    return [(token, 0.0) for token in _SPECIAL] + list(tokens.items())


def write_tokenizer(
    folder: Path, *, vocab_size: int = 384, max_length: int = 512, sentences: Sequence[str] = ()
) -> int:
    """Make the tokenizer, write it into ``folder`` and return the true vocabulary size.

    Args:
        folder: the ``tokenizer/`` folder; created.
        vocab_size: upper limit; the characters of the corpus are always all there.
        max_length: ``model_max_length``, 512 in every Wan release.
        sentences: captions whose words become tokens before those of the general corpus.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(_vocabulary(vocab_size, [*sentences, *corpus()]), unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": max_length,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    special = {key: settings[key] for key in ("eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    return int(tokenizer.get_vocab_size())
