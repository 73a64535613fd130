"""Small vocabularies of the two kinds that Mistral publishes, and the token ids of their own libraries.

Writes into tests/fixtures/tokenizers: spm/tokenizer.model, a SentencePiece model of the BPE type, with ids by
sentencepiece; tekken/tekken.json with ids by mistral-common. Each folder has its texts and ids in ids.json.

    pip install -r tests/reference/requirements.txt
    python tests/reference/text.py            # writes the files
    python tests/reference/text.py --check    # encodes the texts again and compares
"""

import argparse
import base64
import collections
import io
import json
import sys
from pathlib import Path

import regex
import sentencepiece
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

TESTS = Path(__file__).resolve().parent.parent
FIXTURES = TESTS / "fixtures" / "tokenizers"

# What Tekken's published vocabularies cut text with.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPECIAL = 32
TEKKEN_MERGES = 300
# Tokens behind the size that the file states, which nobody may use.
TEKKEN_SURPLUS = 20

TEXTS = [
    "",
    " ",
    "   ",
    "hello",
    " hello",
    "Hello, world! How are you?",
    "two  spaces   three\tTAB\u00a0nbsp",
    "line\nbreak\r\nand\n\n\nmore \n end \n",
    "1234567890 3.14159 -42 1,000,000",
    "don't can't I'LL we've O'Neill",
    "CamelCaseHTTPServer snake_case kebab-case",
    "def f(x):\n    return x ** 2  # squared\n",
    "https://example.org/a/b?c=d&e=%20#frag//",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Ça va où, garçon? Œuvre naïve — «déjà vu»…",
    "Съешь же ещё этих мягких французских булок",
    "日本語のテキスト。中文字符，한국어 문장",
    "مرحبا بالعالم שלום עולם",
    "🚀 🙂👍🏽 👩‍👩‍👧‍👦 🇩🇪 e\u0301 = é",
    "\u0000\u0001 control \u007f \ufffd \ufeff",
    "▁underline▁ and ▁▁",
    "<s>[INST] not special [/INST]</s> <unk> <0x41>",
    "a<sep>b <sep> c<sep>",
    "<sep>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the the the letter keeper lighthouse",
]


def corpus():
    text = (TESTS / "golden" / "text.txt").read_text()
    # Other scripts get a few tokens of their own.
    return text.splitlines() + [text for text in TEXTS[11:19]] * 3


def make_spm(path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in corpus() if line), model_writer=model, model_type="bpe",
        vocab_size=640, normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.999, num_threads=1,
        control_symbols=["[INST]", "[/INST]"], user_defined_symbols=["<sep>"], minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def spm_ids(path):
    processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    return [processor.encode(text) for text in TEXTS]


def make_tekken(path):
    words = collections.Counter(word.encode() for line in corpus() for word in regex.findall(PATTERN, line + "\n"))
    words = {tuple(bytes([byte]) for byte in word): count for word, count in words.items()}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < 256 + TEKKEN_MERGES + TEKKEN_SURPLUS:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(b"".join(best))
        words = {merged(word, best): count for word, count in words.items()}
    size = TEKKEN_SPECIAL + 256 + TEKKEN_MERGES
    data = {
        "config": {
            "pattern": PATTERN, "num_vocab_tokens": len(tokens), "default_vocab_size": size,
            "default_num_special_tokens": TEKKEN_SPECIAL, "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": text_of(token)}
            for rank, token in enumerate(tokens)
        ],
    }
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")


def merged(word, pair):
    found, at = [], 0
    while at < len(word):
        if word[at : at + 2] == pair:
            found.append(word[at] + word[at + 1])
            at += 2
        else:
            found.append(word[at])
            at += 1
    return tuple(found)


def text_of(token):
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def tekken_ids(path):
    tokenizer = Tekkenizer.from_file(path)
    return [tokenizer.encode(text, bos=False, eos=False) for text in TEXTS]


KINDS = {"spm": ("tokenizer.model", make_spm, spm_ids), "tekken": ("tekken.json", make_tekken, tekken_ids)}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="compare with the committed ids, write nothing")
    arguments = arguments.parse_args()
    failed = False
    for kind, (name, make, encode) in KINDS.items():
        folder = FIXTURES / kind
        if not arguments.check:
            folder.mkdir(parents=True, exist_ok=True)
            make(folder / name)
        found = [{"text": text, "ids": ids} for text, ids in zip(TEXTS, encode(folder / name))]
        lines = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in found)
        listed = f"[\n{lines}\n]\n"
        if arguments.check:
            same = (folder / "ids.json").read_text() == listed
            failed |= not same
            print(f"{kind}: {'reproduces' if same else 'ids.json differs'}")
        else:
            (folder / "ids.json").write_text(listed)
            print(f"{kind}: {len(found)} texts, {sum(len(case['ids']) for case in found)} tokens")
    sys.exit(failed)


if __name__ == "__main__":
    main()
