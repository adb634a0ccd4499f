//! Text ↔ token ids: the tokenizer of a checkpoint, UTF-8 pieced together from token bytes, and (in `chat` and
//! `harmony`) conversations ↔ token ids.
//!
//! Text of users never becomes a control token here: [`Tokenizer::encode`] spells out what only looks like one.

mod bounds;
pub mod chat;
pub mod harmony;
mod text;

pub use chat::{ChatFormat, ChatOptions, ChatTemplate, Message, Reasoning};
pub use harmony::{Channel, Event, Harmony, HarmonyMessage, HarmonyParser};
pub use text::{Text, leading_token};

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};

/// A token's number: its row in the embedding.
pub type TokenId = u32;

/// A decoder whose replacements are longer, or make longer tokens, is a broken file.
const MAX_REPLACEMENT: usize = 64;
const MAX_TOKEN_BYTES: usize = 1 << 16;

/// Ids above this are a broken file, not a vocabulary.
const MAX_TOKEN_ID: TokenId = 1 << 24;

/// The tokenizer of a checkpoint (`tokenizer.json`). Clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    /// Set to read special tokens as ordinary text.
    hf: tokenizers::Tokenizer,
    specials: Specials,
    table: ByteTable,
    /// Spaces that a text does not begin with, though its first token does.
    lead: usize,
    vocab_size: usize,
    max_id: TokenId,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`; `file_name` is for messages.
    pub fn from_bytes(file_name: &str, json: &[u8]) -> Result<Self> {
        let unusable = |reason: String| Error::file(file_name, format!("not a usable tokenizer: {reason}"));
        let mut hf = tokenizers::Tokenizer::from_bytes(json).map_err(|e| unusable(e.to_string()))?;
        hf.set_encode_special_tokens(true);
        hf.with_truncation(None).map_err(|e| unusable(e.to_string()))?;
        hf.with_padding(None);

        let vocab = hf.get_vocab(true);
        if vocab.is_empty() {
            return Err(unusable("the vocabulary is empty".into()));
        }
        if let Some((token, id)) = vocab.iter().find(|(_, id)| **id > MAX_TOKEN_ID) {
            return Err(unusable(format!("token {token:?} has id {id}; at most {MAX_TOKEN_ID} is expected")));
        }
        let mut specials = Specials::default();
        let mut added = HashMap::new();
        for (id, token) in hf.get_added_tokens_decoder() {
            if token.special && !token.content.is_empty() {
                specials.insert(&token.content, id);
            }
            added.insert(id, token.content);
        }
        specials.finish();
        let spelling = match hf.get_decoder() {
            None => Spelling::default(),
            Some(decoder) => {
                let decoder = serde_json::to_value(decoder).map_err(|e| unusable(e.to_string()))?;
                Spelling::of(&decoder).map_err(unusable)?
            }
        };
        let table = ByteTable::new(&vocab, |id, token| spelling.bytes(token, added.contains_key(&id)));
        let table = table.map_err(unusable)?;
        let max_id = vocab.values().copied().max().unwrap_or_default();
        let lead = spelling.lead;
        Ok(Self { inner: Arc::new(Inner { vocab_size: vocab.len(), max_id, hf, specials, table, lead }) })
    }

    /// The tokens of ordinary text. A special token spelled in it (`<|end|>`) becomes ordinary tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>> {
        let failed = |reason: String| Error::Text { what: "tokenizer".into(), reason };
        let mut ids = Vec::new();
        let mut todo = vec![text];
        while let Some(text) = todo.pop() {
            let encoding = self.inner.hf.encode_fast(text, false).map_err(|e| failed(e.to_string()))?;
            if !encoding.get_ids().iter().any(|&id| self.is_special(id)) {
                ids.extend_from_slice(encoding.get_ids());
                continue;
            }
            // This vocabulary also reaches a special token by way of its words: there the text is cut within the word.
            let encoding = self.inner.hf.encode(text, false).map_err(|e| failed(e.to_string()))?;
            let mut rest = text;
            let mut parts = Vec::new();
            for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()).rev() {
                let word = text.get(start..end).unwrap_or_default();
                if self.is_special(id)
                    && let Some(second) = word.char_indices().nth(1)
                    && let Some((head, tail)) = rest.split_at_checked(start + second.0)
                {
                    parts.push(tail);
                    rest = head;
                }
            }
            if parts.is_empty() {
                return Err(failed("ordinary text becomes a special token in this vocabulary".into()));
            }
            todo.extend(parts);
            todo.push(rest);
        }
        Ok(ids)
    }

    /// The tokens of a raw prompt or rendered template: spelled special tokens are recognised.
    pub fn encode_with_specials(&self, text: &str) -> Result<Vec<TokenId>> {
        let mut ids = Vec::new();
        for piece in self.inner.specials.split(text) {
            match piece.special {
                Some(id) => ids.push(id),
                None => ids.extend(self.encode(piece.text)?),
            }
        }
        Ok(ids)
    }

    /// The id of a token as the vocabulary writes it, such as `<|start|>`.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.hf.token_to_id(token)
    }

    /// Whether the token is a control token rather than text.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.inner.specials.texts.contains_key(&id)
    }

    /// The text of tokens, special ones left out; bytes that are not UTF-8 become U+FFFD. A whole text: where the vocabulary
    /// begins every text with a space, that is left out as well.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        let mut bytes = Vec::new();
        for &id in ids.iter().filter(|&&id| !self.is_special(id)) {
            bytes.extend_from_slice(&self.token_bytes(id));
        }
        let lead = bytes.iter().take(self.inner.lead).take_while(|b| **b == b' ').count();
        String::from_utf8_lossy(&bytes[lead..]).into_owned()
    }

    /// The bytes that one token stands for, wherever it stands: part of a character, perhaps, or a word with the space before
    /// it. A special token gives its spelling, an unknown id nothing.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        match self.inner.specials.texts.get(&id) {
            Some(text) => text.clone().into_bytes(),
            None => self.inner.table.get(id).to_vec(),
        }
    }

    /// The largest id that has a spelling.
    pub fn max_id(&self) -> TokenId {
        self.inner.max_id
    }

    /// How many tokens have a spelling, special ones included. A model's vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// How the tokens differ from those of another tokenizer, said of this one; `None`: equal ids are equal tokens.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if Arc::ptr_eq(&self.inner, &other.inner) {
            return None;
        }
        let spelled = |tokenizer: &Self, id| match tokenizer.inner.hf.id_to_token(id) {
            Some(token) if tokenizer.is_special(id) => format!("the special token {token:?}"),
            Some(token) => format!("{token:?}"),
            None => "nothing".to_owned(),
        };
        let differs = |id: &TokenId| {
            let token = |tokenizer: &Self| (tokenizer.inner.hf.id_to_token(*id), tokenizer.is_special(*id));
            token(self) != token(other)
        };
        let id = (0..=self.max_id().max(other.max_id())).find(differs)?;
        Some(format!("has {} as token {id} instead of {}", spelled(self, id), spelled(other, id)))
    }

    pub(super) fn specials(&self) -> &Specials {
        &self.inner.specials
    }
}

/// The special tokens' spellings, and where they occur in a text.
#[derive(Default)]
pub(super) struct Specials {
    ids: HashMap<String, TokenId>,
    texts: HashMap<TokenId, String>,
    /// Byte lengths of the spellings, longest first.
    lengths: Vec<usize>,
    /// Whether some spelling starts with the byte.
    first: Vec<bool>,
}

/// A stretch of text: one special token, or ordinary text.
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    pub(super) special: Option<TokenId>,
}

impl Specials {
    fn insert(&mut self, text: &str, id: TokenId) {
        self.ids.insert(text.to_owned(), id);
        self.texts.insert(id, text.to_owned());
    }

    fn finish(&mut self) {
        self.lengths = self.ids.keys().map(String::len).collect();
        self.lengths.sort_unstable_by(|a, b| b.cmp(a));
        self.lengths.dedup();
        self.first = vec![false; 256];
        for text in self.ids.keys() {
            self.first[usize::from(text.as_bytes()[0])] = true;
        }
    }

    /// The longest special spelled at the start of `text`, with its length.
    fn at(&self, text: &str) -> Option<(TokenId, usize)> {
        if !self.first[usize::from(*text.as_bytes().first()?)] {
            return None;
        }
        self.lengths.iter().find_map(|&len| Some((*self.ids.get(text.get(..len)?)?, len)))
    }

    /// Cuts a text at the special tokens spelled in it, leftmost and longest first.
    pub(super) fn split<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Piece<'a>> {
        let mut start = 0;
        let mut found = None;
        std::iter::from_fn(move || {
            if let Some((special, len)) = found.take() {
                let piece = Piece { text: &text[start..start + len], special: Some(special) };
                start += len;
                return Some(piece);
            }
            let rest = &text[start..];
            let hit = rest.char_indices().find_map(|(at, _)| Some((at, self.at(&rest[at..])?)));
            let (plain, next) = hit.map_or((rest.len(), None), |(at, special)| (at, Some(special)));
            found = next;
            let piece = Piece { text: &rest[..plain], special: None };
            start += plain;
            (plain > 0 || next.is_some()).then_some(piece)
        })
        .filter(|piece| !piece.text.is_empty())
    }

    /// All spellings.
    pub(super) fn spellings(&self) -> impl Iterator<Item = &str> {
        self.ids.keys().map(String::as_str)
    }
}

/// How a vocabulary writes bytes: as its `decoder` reads them.
#[derive(Default)]
struct Spelling {
    /// A character for each byte; empty where the vocabulary is not byte-level.
    alphabet: HashMap<char, u8>,
    /// What stands for what, in this order (SentencePiece's `▁` for a space).
    replaced: Vec<(String, String)>,
    /// Whether `<0x0A>` is a byte.
    bytes_named: bool,
    /// Spaces that are left out at the beginning of a text.
    lead: usize,
}

impl Spelling {
    /// By the decoder of a `tokenizer.json`; or why that is not one of these.
    fn of(decoder: &serde_json::Value) -> Result<Self, String> {
        let mut spelling = Self::default();
        spelling.read(decoder)?;
        Ok(spelling)
    }

    fn read(&mut self, decoder: &serde_json::Value) -> Result<(), String> {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let kind = text(&decoder["type"]);
        match kind.as_str() {
            "Sequence" => decoder["decoders"].as_array().into_iter().flatten().try_for_each(|d| self.read(d))?,
            "ByteLevel" => self.alphabet = byte_alphabet().into_iter().zip(0..=255).collect(),
            "ByteFallback" => self.bytes_named = true,
            "Fuse" => {}
            "Metaspace" => {
                self.replaced.push((text(&decoder["replacement"]), " ".into()));
                self.lead = usize::from(decoder["prepend_scheme"] != "never");
            }
            "Replace" if decoder["pattern"]["String"].as_str().is_some_and(|from| !from.is_empty()) => {
                let to = text(&decoder["content"]);
                if to.len() > MAX_REPLACEMENT {
                    return Err(format!("its decoder replaces something by {} bytes", to.len()));
                }
                self.replaced.push((text(&decoder["pattern"]["String"]), to));
            }
            "Strip" if decoder["content"] == " " && decoder["stop"] == 0 => {
                self.lead = decoder["start"].as_u64().unwrap_or_default() as usize;
            }
            _ => {
                return Err(format!(
                    "its decoder has a step {kind:?}; byte-level and SentencePiece vocabularies are read"
                ));
            }
        }
        Ok(())
    }

    /// The bytes of a token; added ones are written as they are in byte-level vocabularies.
    fn bytes(&self, token: &str, added: bool) -> Result<Vec<u8>, String> {
        if !self.alphabet.is_empty() {
            let spelled: Option<Vec<u8>> = token.chars().map(|c| self.alphabet.get(&c).copied()).collect();
            return Ok(spelled.filter(|_| !added).unwrap_or_else(|| token.into()));
        }
        let named = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
        match named.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| self.bytes_named) {
            Some(byte) => Ok(vec![byte]),
            None => {
                let replaced = self.replaced.iter().try_fold(token.to_owned(), |text, (from, to)| {
                    let text = text.replace(from, to);
                    (text.len() <= MAX_TOKEN_BYTES).then_some(text)
                });
                Ok(replaced.ok_or("its decoder makes a token longer than any text")?.into())
            }
        }
    }
}

/// Every token's bytes, one after the other; token `id` ends at `ends[id]`.
struct ByteTable {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl ByteTable {
    /// With the bytes of each token, by its id and name.
    fn new(
        vocab: &HashMap<String, TokenId>,
        bytes: impl Fn(TokenId, &str) -> Result<Vec<u8>, String>,
    ) -> Result<Self, String> {
        let mut tokens: Vec<(TokenId, &str)> = vocab.iter().map(|(token, &id)| (id, token.as_str())).collect();
        tokens.sort_unstable();
        let mut table = Self { bytes: Vec::new(), ends: Vec::new() };
        for (id, token) in tokens {
            // Ids without a token stand for nothing; of two spellings of one id the first counts.
            if table.ends.len() > id as usize {
                continue;
            }
            table.ends.resize(id as usize, table.bytes.len() as u32);
            table.bytes.extend(bytes(id, token)?);
            table.ends.push(table.bytes.len() as u32);
        }
        if u32::try_from(table.bytes.len()).is_err() {
            return Err("its tokens take more than 4 GiB".into());
        }
        Ok(table)
    }

    fn get(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// The character that byte-level vocabularies write for each byte: itself where it is visible, else the next free one
/// from U+0100 on.
fn byte_alphabet() -> Vec<char> {
    let mut next = 0x100u32;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
        })
        .collect()
}

/// Pieces characters together from bytes that arrive in any portions. Over a whole stream the text is that of
/// [`String::from_utf8_lossy`].
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    /// The bytes of a character whose end has not come yet: at most three.
    tail: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes; gives the characters that are complete by now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.tail.extend_from_slice(bytes);
        let mut complete = self.tail.len();
        if let Some(last) = self.tail.utf8_chunks().last() {
            let open = last.invalid();
            // A chunk at the very end is open where more bytes could still make it a character.
            if !open.is_empty() && std::str::from_utf8(open).is_err_and(|e| e.error_len().is_none()) {
                complete -= open.len();
            }
        }
        let rest = self.tail.split_off(complete);
        let bytes = std::mem::replace(&mut self.tail, rest);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Ends the stream: a character left open becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.tail)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_of_any_bytes_reads_like_the_whole() {
        let mut seed = 7u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % below
        };
        let palette = [0x41, 0x80, 0xBF, 0xC2, 0xC0, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xF5, 0x9F, 0x98, 0x80, 0x82, 0xAC];
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..random(12)).map(|_| palette[random(16) as usize]).collect();
            let (mut stream, mut text, mut rest) = (Utf8Stream::default(), String::new(), bytes.as_slice());
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(random(rest.len() as u64 + 1) as usize);
                text += &stream.push(head);
                assert!(stream.tail.len() <= 3);
                rest = tail;
            }
            text += &stream.finish();
            assert_eq!(text, String::from_utf8_lossy(&bytes), "{bytes:x?}");
        }
    }

    #[test]
    fn characters_come_as_soon_as_they_are_complete() {
        let mut stream = Utf8Stream::default();
        let portions: Vec<String> = [&b"a\xF0"[..], b"\x9F\x98", b"\x80b", b"\xFF"].map(|b| stream.push(b)).into();
        assert_eq!(portions, ["a", "", "😀b", "\u{FFFD}"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn a_broken_tokenizer_names_its_file() {
        for json in [&b""[..], b"{", b"[]", b"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", b"\xff\xfe"] {
            let error = Tokenizer::from_bytes("dir/tokenizer.json", json).unwrap_err();
            assert!(matches!(&error, Error::File { .. }), "{error}");
            assert!(error.to_string().starts_with("dir/tokenizer.json: "), "{error}");
        }
    }
}
