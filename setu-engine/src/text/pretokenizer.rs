//! How byte-level vocabularies of GGUF files cut text into words, by the name in `tokenizer.ggml.pre`.
//!
//! The patterns are those the models were trained with. Each splits what the one before it left, matches and
//! the gaps between them alike, so that no character is lost.

use setu_core::{Error, Result};

/// The pre-tokenizer of a family of models. No pattern takes more than linear time, whatever the text.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// What GGUF files call it.
    pub names: &'static [&'static str],
    pub patterns: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges would make of it.
    pub ignore_merges: bool,
    /// A text begins with BOS unless the file says otherwise.
    pub add_bos: bool,
}

impl PreTokenizer {
    const fn new(names: &'static [&'static str], patterns: &'static [&'static str]) -> PreTokenizer {
        PreTokenizer { names, patterns, ignore_merges: false, add_bos: false }
    }

    const fn whole_words(mut self) -> PreTokenizer {
        self.ignore_merges = true;
        self
    }

    const fn with_bos(mut self) -> PreTokenizer {
        self.add_bos = true;
        self
    }
}

/// The pre-tokenizer that GGUF files call `name`.
pub(super) fn find(name: &str) -> Result<&'static PreTokenizer> {
    PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let mut known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
        known.sort_unstable();
        Error::unsupported(format!(
            "the pre-tokenizer `{name}` (tokenizer.ggml.pre) is not known; use the model's directory with tokenizer.json \
             instead; known are {}",
            known.join(", ")
        ))
    })
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Words, numbers and punctuation of DeepSeek V3 and its kin, behind digits and CJK.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const CJK: &str = "[一-龥\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";

const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// The cased letters of the Unicode version that DeepSeek LLM was trained with.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ\x{1f5f}-\x{1f7d}ᾀ-ᾴᾶ-ᾼ\x{1fbe}ῂ-ῄῆ-ῌ\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

static PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer::new(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    PreTokenizer::new(
        &[
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "jina-es", "jina-de", "jina-v1-en",
            "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert",
            "exaone4",
        ],
        &[GPT2],
    ),
    PreTokenizer::new(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[r"\p{N}", GPT2],
    ),
    PreTokenizer::new(
        &[
            "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
        ],
        &[LLAMA3],
    )
    .whole_words()
    .with_bos(),
    PreTokenizer::new(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    PreTokenizer::new(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[QWEN2],
    ),
    PreTokenizer::new(
        &["qwen35"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    PreTokenizer::new(
        &["ufakzeka"],
        &[r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    ),
    PreTokenizer::new(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    PreTokenizer::new(
        &["minicpm5"],
        &[
            r"\p{N}{1,3}",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    )
    .whole_words(),
    PreTokenizer::new(
        &["seed-coder"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    PreTokenizer::new(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ],
    ),
    PreTokenizer::new(
        &["exaone-moe"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ],
    ),
    PreTokenizer::new(
        &["jais-2"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        ],
    ),
    PreTokenizer::new(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    PreTokenizer::new(
        &["tekken"],
        &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    )
    .whole_words()
    .with_bos(),
    PreTokenizer::new(
        &["kimi-k2"],
        &[
            r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    PreTokenizer::new(
        &["youtu"],
        &[
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    )
    .whole_words(),
    PreTokenizer::new(
        &["deepseek-llm"],
        &[
            r"[\r\n]",
            DEEPSEEK_LETTERS,
            "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+",
            r"\s+$",
            "[一-龥\u{800}-一가-\u{d7ff}]+",
            r"\p{N}+",
        ],
    ),
    PreTokenizer::new(
        &["deepseek-coder"],
        &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u{800}-一가-\u{d7ff}]+", r"\p{N}"],
    ),
    PreTokenizer::new(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[r"\p{N}{1,3}", CJK, DEEPSEEK3]),
    PreTokenizer::new(
        &["spark2_5"],
        &[
            r"\p{N}{1,3}",
            CJK,
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##,
            r"\p{N}",
        ],
    ),
    PreTokenizer::new(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    PreTokenizer::new(&["bloom", "poro-chat", "gpt3-finnish"], &[BLOOM]),
    PreTokenizer::new(&["viking"], &[BLOOM, r"\p{N}"]),
    PreTokenizer::new(
        &["chameleon"],
        &[
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ],
    )
    .with_bos(),
];

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;
    use crate::text::library::split_words;

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        split_words(find(name).unwrap().patterns).unwrap().pre_tokenize(&mut pieces).unwrap();
        let words = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        words.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn words_are_cut_as_each_family_does() {
        for (name, text, expected) in [
            ("gpt-2", "it's 2024  now", "it|'s| 2024| | now"),
            ("gpt-2", "IT'S", "IT|'|S"),
            ("smollm", "x½ 2024", "x|½| |2|0|2|4"),
            ("llama-bpe", "IT'S 12345\n\n x", "IT|'S| |123|45|\n\n| x"),
            ("qwen2", "a(b) 12", "a|(b|)| |1|2"),
            ("default", "a+b 1234", "a|+|b| |123|4"),
            ("falcon", "`a` 1234", "`|a|`| |123|4"),
            ("tekken", "CamelCase's", "Camel|Case|'s"),
            ("gpt-4o", "CamelCASE's XMLHttp", "Camel|CASE's| XMLHttp"),
            ("deepseek-coder", "ab 12,c\nd", "ab| |1|2|,|c|\n|d"),
            ("deepseek-llm", "ab cd, 12  ", "ab| cd|,| |12|  "),
            ("deepseek-v3", "日本x 1234", "日本|x| |123|4"),
            ("kimi-k2", "日本ab cd", "日本|ab| cd"),
            ("bloom", "a, b.c", "a|,| b|.|c"),
            ("viking", "a12", "a|1|2"),
            ("chameleon", "a-b", "a|-|b"),
            ("bailingmoe", "it'LL\n\n b", "it|'LL|\n\n| b"),
        ] {
            assert_eq!(words(name, text).join("|"), expected, "{name}");
        }
    }

    #[test]
    fn no_pre_tokenizer_loses_a_character() {
        let text = "Ein Test, it's 12345 “½” 日本語 にほん 한국어\r\n\t\tx = {'a': [1]}  \n\n\u{200d}👩‍👧 ﷺ é  ";
        for pre in PRE_TOKENIZERS {
            for name in pre.names {
                assert_eq!(words(name, text).concat(), text, "{name}");
            }
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_known() {
        let error = find("gpt-9").unwrap_err().to_string();
        assert!(error.starts_with("the pre-tokenizer `gpt-9` (tokenizer.ggml.pre) is not known"), "{error}");
        assert!(error.contains("smollm, solar-open"), "{error}");
    }
}
