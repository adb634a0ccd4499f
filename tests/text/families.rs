//! The Qwen3 and Llama families' text: templates as transformers renders them, encodings of the fixtures' tokenizer, and a
//! tokenizer that has no symbol for some bytes.

use fourfold::checkpoint::{Checkpoint, Mapping};
use fourfold::config::Config;
use fourfold::tokenizer::{ChatOptions, ChatTemplate, Message, Reasoning, Text, Tokenizer, Utf8Stream};
use serde_json::json;

use super::{ids, list, read, say, string, vectors};
use crate::families::fixture;

#[test]
fn family_templates_are_rendered_as_transformers_does() {
    let vectors = vectors("family_templates.json");
    let [date, bos, eos] = ["date", "bos_token", "eos_token"].map(|key| string(&vectors[key]));
    let mut n = 0;
    for template in list(&vectors["templates"]) {
        let name = string(&template["name"]);
        let compiled = ChatTemplate::new(name, string(&template["template"])).unwrap().with_tokens(bos, eos);
        for case in list(&template["cases"]) {
            let messages: Vec<Message> = list(&case["messages"])
                .iter()
                .map(|m| Message {
                    thinking: m["reasoning_content"].as_str().map(str::to_owned),
                    ..say(string(&m["role"]), string(&m["content"]))
                })
                .collect();
            let reasoning = case["enable_thinking"].as_bool();
            let reasoning = reasoning.map(|on| if on { Reasoning::High } else { Reasoning::Off });
            let options = ChatOptions { reasoning, date: Some(date.to_owned()) };
            let got = compiled.render(&messages, case["add_generation_prompt"] == true, &options).unwrap();
            assert_eq!(got, string(&case["text"]), "{name}: {}, {reasoning:?}", case["what"]);
            n += 1;
        }
    }
    assert_eq!(n, 80);
}

#[test]
fn the_fixtures_tokenizer_encodes_as_transformers_does() {
    for name in ["qwen3_moe/modelopt", "qwen3_moe/compressed_tensors"] {
        let checkpoint = Checkpoint::open(&fixture(name), Mapping::Read).unwrap();
        let text = Text::load(&checkpoint, &Config::open(&checkpoint).unwrap()).unwrap();
        let (tokenizer, chat) = (text.tokenizer.unwrap(), text.chat.unwrap());
        let golden: serde_json::Value =
            serde_json::from_slice(&read(&format!("tests/fixtures/{name}/tokenizer_golden.json"))).unwrap();
        assert_eq!(tokenizer.vocab_size() as u64, golden["vocab_size"].as_u64().unwrap());
        let cases = golden["encode"].as_object().unwrap();
        assert_eq!(cases.len(), 5);
        for (text, want) in cases {
            assert_eq!(tokenizer.encode_with_specials(text).unwrap(), ids(want), "{text:?}");
        }
        // The template is in tokenizer_config.json.
        let prompt = chat.prompt(&tokenizer, &[say("user", "hi")], &ChatOptions::default()).unwrap();
        let (turn, start) = ("<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\n");
        let start = tokenizer.encode_with_specials(start).unwrap();
        assert_eq!(prompt, [ids(&cases[turn]), start].concat());
    }
}

/// As in SmolLM2's vocabulary, which lacks 21 of the 256: transformers drops such bytes without a word (checked with
/// tokenizers 0.23.3 on this very file), so that an engine that did otherwise would compute other ids.
#[test]
fn bytes_without_a_symbol_are_dropped_as_transformers_does() {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "Ã": 3, "ab": 4}, "merges": [["a", "b"]]}});
    let tokenizer = Tokenizer::from_bytes("gaps", &serde_json::to_vec(&json).unwrap()).unwrap();
    for (text, want) in [("aéb", &[0, 3, 1][..]), ("a\u{7}b", &[0, 1]), ("ab c ab", &[4, 2, 2, 4]), ("xyz", &[])] {
        assert_eq!(tokenizer.encode(text).unwrap(), want, "{text:?}");
        assert_eq!(tokenizer.encode_with_specials(text).unwrap(), want, "{text:?}");
    }
    // Half a character is left of the first.
    assert_eq!(tokenizer.decode(&[0, 3, 1]), "a\u{FFFD}b");
}

/// Llama 2's kind of vocabulary: words with `▁` for the space before them, and what has no token as `<0xNN>` for each byte.
/// The tokenizers crate decodes whole texts; a reply goes out token by token.
fn sentencepiece(decoder: &serde_json::Value, normalizer: &serde_json::Value) -> Vec<u8> {
    let mut vocab: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    vocab.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocab.extend("▁onceupatimüé".chars().map(String::from));
    let merges = [("▁", "o"), ("o", "n"), ("▁", "u"), ("▁u", "p"), ("▁up", "on"), ("▁", "▁"), ("t", "i"), ("▁", "ti")];
    vocab.extend(merges.map(|(a, b)| format!("{a}{b}")));
    let ids: serde_json::Map<_, _> = vocab.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let json = json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")], "normalizer": normalizer,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": ids, "merges": merges.map(|(a, b)| [a, b])}});
    serde_json::to_vec(&json).unwrap()
}

#[test]
fn sentencepiece_replies_keep_their_spaces_and_characters() {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let normalizer =
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]});
    let fallback = json!({"type": "ByteFallback"});
    let llama = json!({"type": "Sequence", "decoders": [replace("▁", " "), fallback, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let metaspace = json!({"type": "Sequence", "decoders": [fallback,
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}]});
    for decoder in [llama, metaspace] {
        let json = sentencepiece(&decoder, &normalizer);
        let theirs = tokenizers::Tokenizer::from_bytes(&json).unwrap();
        let ours = Tokenizer::from_bytes("sentencepiece", &json).unwrap();
        for text in ["once upon a time", "upon  a Zürich, 你好 😀\nonce", "é", "once </s>", ""] {
            let ids = ours.encode(text).unwrap();
            assert_eq!(ours.decode(&ids), text, "{decoder}");
            assert_eq!(theirs.decode(&ids, true).unwrap(), text, "{decoder}");
            let mut stream = Utf8Stream::default();
            let mut said: String = ids.iter().map(|&id| stream.push(&ours.token_bytes(id))).collect();
            said += &stream.finish();
            assert_eq!(said, if text.is_empty() { String::new() } else { format!(" {text}") }, "{decoder}");
        }
        assert_eq!(ours.token_bytes(3 + 0xE4), [0xE4]);
        assert_eq!(ours.token_bytes(1), b"<s>");
    }
    let wordpiece = sentencepiece(&json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), &normalizer);
    let error = Tokenizer::from_bytes("wordpiece", &wordpiece).unwrap_err().to_string();
    assert!(error.contains("WordPiece") && error.contains("byte-level"), "{error}");
}

/// As `add_bos_token` of tokenizer_config.json says; templates write theirs themselves.
#[test]
fn a_text_begins_with_the_token_that_its_tokenizer_puts_first() {
    let dir = std::env::temp_dir().join(format!("fourfold-leading-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    let from = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fireside");
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    let open = || fourfold::Engine::builder().checkpoint(&dir).device(fourfold::DeviceChoice::Cpu).build().unwrap();
    let engine = open();
    let text = engine.tokenizer().unwrap().encode("Once upon").unwrap();
    assert_eq!((engine.leading_token().unwrap(), engine.text_tokens("Once upon").unwrap()), (None, text.clone()));
    let path = dir.join("tokenizer_config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (id, first) = (0..).find_map(|id| Some((id, special(engine.tokenizer().unwrap(), id)?))).unwrap();
    config["add_bos_token"] = json!(true);
    config["bos_token"] = json!(first);
    std::fs::write(&path, config.to_string()).unwrap();
    let engine = open();
    let all = [&[id], &text[..]].concat();
    assert_eq!(engine.text_tokens("Once upon").unwrap(), all);
    assert_eq!(engine.text_tokens(&format!("{first}Once upon")).unwrap(), all, "once is enough");
    // A chat does without.
    config["bos_token"] = json!("no such token");
    std::fs::write(&path, config.to_string()).unwrap();
    let error = open().text_tokens("Once upon").unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("not in the vocabulary"), "{error}");
    std::fs::remove_dir_all(&dir).unwrap();
}

fn special(tokenizer: &Tokenizer, id: u32) -> Option<String> {
    tokenizer.is_special(id).then(|| String::from_utf8(tokenizer.token_bytes(id)).unwrap())
}
