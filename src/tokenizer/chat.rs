//! Conversations → token ids: chat templates as Hugging Face transformers renders them, and the choice between a
//! template and Harmony.
//!
//! A message cannot forge control tokens: what spells one in its text is encoded as the ordinary text that it is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error as JinjaError, ErrorKind};

use super::harmony::Harmony;
use super::{Specials, TokenId, Tokenizer, bounds};
use crate::error::{Error, Result};

/// The largest template that is read.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// The stack of the thread that renders: templates may nest calls and values.
const STACK_BYTES: usize = 64 << 20;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `developer`, `user` or `assistant`; a template may know more.
    pub role: String,
    /// What was said.
    pub content: String,
    /// The assistant's reasoning before its answer, for templates that keep it.
    pub thinking: Option<String>,
}

impl Message {
    /// A message without reasoning.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), thinking: None }
    }
}

/// How much a model should reason before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reasoning {
    /// None, where the template can say so (`enable_thinking`); else little.
    Off,
    /// Little.
    Low,
    /// The models' own default.
    Medium,
    /// Much.
    High,
}

impl Reasoning {
    /// The word in prompts: `low`, `medium`, `high`. They have none for [`Reasoning::Off`], which is `low` there.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off | Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// What a prompt says beside the messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatOptions {
    /// Reasoning effort; `None` leaves it to the template (Harmony: medium).
    pub reasoning: Option<Reasoning>,
    /// Today as `YYYY-MM-DD`; `None` asks the clock (UTC). Fix it where prompts must repeat.
    pub date: Option<String>,
}

/// How a checkpoint wants its conversations written.
#[derive(Debug, Clone)]
pub enum ChatFormat {
    /// The checkpoint's own template.
    Template(ChatTemplate),
    /// gpt-oss's Harmony.
    Harmony(Harmony),
}

impl ChatFormat {
    /// The prompt's tokens: the messages and the start of the assistant's reply.
    pub fn prompt(&self, tokenizer: &Tokenizer, messages: &[Message], options: &ChatOptions) -> Result<Vec<TokenId>> {
        match self {
            Self::Template(template) => template.encode(tokenizer, messages, options),
            Self::Harmony(harmony) => harmony.prompt(tokenizer, messages, options),
        }
    }
}

/// A chat template (`chat_template.jinja`), rendered as transformers does, with bounds on time and memory.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    file_name: String,
    /// With the bounds written in.
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads a template; `file_name` is for messages. A syntax error names file and line.
    pub fn new(file_name: &str, source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE_BYTES {
            let reason = format!("a chat template of {} bytes; at most {MAX_SOURCE_BYTES} are read", source.len());
            return Err(Error::file(file_name, reason));
        }
        let source = bounds::guarded(source).map_err(|at| {
            let line = source[..at].matches('\n').count() + 1;
            Error::file(file_name, format!("the chat template has too much text without words from line {line} on"))
        })?;
        let syntax = environment(None).template_from_named_str(file_name, &source).map(|_| ());
        syntax.map_err(|e| {
            let line = e.line().map_or(String::new(), |line| format!("line {line}: "));
            let reason = e.detail().map_or_else(|| e.kind().to_string(), str::to_owned);
            Error::file(file_name, format!("the chat template does not parse: {line}{reason}"))
        })?;
        let [bos_token, eos_token] = [String::new(), String::new()];
        Ok(Self { file_name: file_name.to_owned(), source, bos_token, eos_token })
    }

    /// Sets the template's variables `bos_token` and `eos_token` (from `tokenizer_config.json`).
    pub fn with_tokens(mut self, bos_token: &str, eos_token: &str) -> Self {
        self.bos_token = bos_token.to_owned();
        self.eos_token = eos_token.to_owned();
        self
    }

    /// The conversation as text; `add_generation_prompt` starts the assistant's reply.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool, options: &ChatOptions) -> Result<String> {
        // A thread of its own for its stack: nested values are freed one frame per level.
        std::thread::scope(|scope| {
            let run = || self.render_here(messages, add_generation_prompt, options);
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run);
            let thread = thread.map_err(|e| self.failed(format!("no thread to render it: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(self.failed("the template engine panicked".into())))
        })
    }

    /// The prompt's tokens: the messages and the start of the assistant's reply. Control tokens come from the template
    /// alone; those that a message spells out are ordinary text.
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message], options: &ChatOptions) -> Result<Vec<TokenId>> {
        let mark = unused_char(
            messages.iter().flat_map(|m| [m.role.as_str(), &m.content, m.thinking.as_deref().unwrap_or_default()]),
        );
        let mark = mark.ok_or_else(|| self.failed("the messages use up all private-use characters".into()))?;
        let broken = |text: &str| break_specials(tokenizer.specials(), text, mark);
        let marked: Vec<Message> = messages
            .iter()
            .map(|m| Message {
                role: broken(&m.role),
                content: broken(&m.content),
                thinking: m.thinking.as_deref().map(broken),
            })
            .collect();
        let text = self.render(&marked, true, options)?;
        let mut ids = Vec::new();
        for piece in tokenizer.specials().split(&text) {
            match piece.special {
                Some(id) => ids.push(id),
                None => ids.extend(tokenizer.encode(&piece.text.replace(mark, ""))?),
            }
        }
        if ids.is_empty() {
            return Err(self.failed("it makes nothing of these messages".into()));
        }
        Ok(ids)
    }

    fn render_here(&self, messages: &[Message], add_generation_prompt: bool, options: &ChatOptions) -> Result<String> {
        let env = environment(options.date.clone());
        let template = env.template_from_named_str(&self.file_name, &self.source).map_err(|e| self.jinja(&e))?;
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| {
                // gpt-oss's template asks for `thinking`, Qwen3's for `reasoning_content`.
                let thinking = m.thinking.as_deref().into_iter();
                let thinking =
                    thinking.flat_map(|t| ["thinking", "reasoning_content"].map(|key| (key, Value::from(t))));
                let fields = [("role", Value::from(&m.role)), ("content", Value::from(&m.content))];
                map(fields.into_iter().chain(thinking))
            })
            .collect();
        let mut variables = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("bos_token", Value::from(&self.bos_token)),
            ("eos_token", Value::from(&self.eos_token)),
        ];
        if let Some(reasoning) = options.reasoning {
            variables.push(("reasoning_effort", Value::from(reasoning.as_str())));
            variables.push(("enable_thinking", Value::from(reasoning != Reasoning::Off)));
        }
        let mut out = Bounded(Vec::new());
        let done = template.render_captured_to(map(variables.into_iter()), &mut out).map(|_| ());
        if out.0.len() >= bounds::MAX_BYTES {
            return Err(self.failed(format!("the template writes more than {} MiB", bounds::MAX_BYTES >> 20)));
        }
        done.map_err(|e| self.jinja(&e))?;
        String::from_utf8(out.0).map_err(|_| self.failed("the template writes broken UTF-8".into()))
    }

    fn failed(&self, reason: String) -> Error {
        Error::Text { what: self.file_name.clone(), reason }
    }

    fn jinja(&self, error: &JinjaError) -> Error {
        let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
        let reason = match (error.kind(), error.detail()) {
            (ErrorKind::OutOfFuel, _) => "the template does not come to an end".to_owned(),
            (_, Some(detail)) => detail.to_owned(),
            (kind, None) => kind.to_string(),
        };
        self.failed(format!("{line}{reason}"))
    }
}

/// Output that stops growing at the bound.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = bounds::MAX_BYTES - self.0.len();
        self.0.extend_from_slice(&bytes[..bytes.len().min(room)]);
        match bytes.len() <= room {
            true => Ok(bytes.len()),
            false => Err(std::io::ErrorKind::FileTooLarge.into()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn map<'a>(fields: impl Iterator<Item = (&'a str, Value)>) -> Value {
    Value::from(fields.collect::<BTreeMap<_, _>>())
}

/// A private-use character that occurs in none of the texts.
fn unused_char<'a>(texts: impl Iterator<Item = &'a str>) -> Option<char> {
    let private = |c: char| matches!(c, '\u{E000}'..='\u{F8FF}' | '\u{F0000}'..='\u{FFFFD}');
    let used: std::collections::HashSet<char> = texts.flat_map(str::chars).filter(|&c| private(c)).collect();
    ('\u{E000}'..='\u{F8FF}').chain('\u{F0000}'..='\u{FFFFD}').find(|c| !used.contains(c))
}

/// Writes `mark` wherever a special token's spelling begins in `text`, also where the text holds only its first two
/// characters: what follows in the template must not complete it.
fn break_specials(specials: &Specials, text: &str, mark: char) -> String {
    let begins = |s: &str| s.char_indices().nth(2).map_or(s.len(), |(at, _)| at);
    let starts: std::collections::HashSet<&str> = specials.spellings().map(|s| &s[..begins(s)]).collect();
    let firsts: std::collections::HashSet<char> = specials.spellings().filter_map(|s| s.chars().next()).collect();
    let end = text.trim_end().len();
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        out.push(c);
        if firsts.contains(&c) {
            let rest = &text[at..];
            let after = at + c.len_utf8();
            if starts.contains(&rest[..begins(rest)]) || starts.contains(&rest[..c.len_utf8()]) || after == end {
                out.push(mark);
            }
        }
    }
    out
}

fn environment(date: Option<String>) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("the delimiters are Jinja's own"),
    );
    env.set_debug(false);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    bounds::install(&mut env);
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
        let message: String = message.chars().take(2000).collect();
        Err(JinjaError::new(ErrorKind::InvalidOperation, format!("the template refuses the messages: {message}")))
    });
    env.add_function("strftime_now", move |format: String| strftime(&format, date.as_deref()));
    env
}

/// `json.dumps` as transformers' filter calls it: characters kept, order kept, `, ` and `: ` between.
fn to_json(value: &Value, named: Kwargs) -> Result<String, JinjaError> {
    let indent: Option<usize> = named.get("indent")?;
    let separators: Option<Vec<String>> = named.get("separators")?;
    let item = if indent.is_some() { "," } else { ", " };
    let [item, key] = match separators.as_deref() {
        None => [item, ": "],
        Some([item, key]) if item.len() + key.len() <= 16 => [item.as_str(), key.as_str()],
        Some(_) => {
            return Err(JinjaError::new(ErrorKind::InvalidOperation, "tojson: two short separators are expected"));
        }
    };
    let ascii = named.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = named.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    named.assert_all_used()?;
    if indent.is_some_and(|n| n > 16) {
        return Err(JinjaError::new(ErrorKind::InvalidOperation, "tojson: indents of up to 16 are expected"));
    }
    let mut json = Json { out: String::new(), indent, item, key, ascii, sorted };
    json.value(value, 1)?;
    Ok(json.out)
}

struct Json<'a> {
    out: String,
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
    ascii: bool,
    sorted: bool,
}

impl Json<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), JinjaError> {
        if depth > 64 || self.out.len() > bounds::MAX_BYTES {
            return Err(JinjaError::new(
                ErrorKind::InvalidOperation,
                "tojson: the value is nested too deep or too large",
            ));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group(['[', ']'], &items, depth, |json, item| json.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.group(['{', '}'], &keys, depth, |json, key| {
                    json.string(&key.to_string());
                    json.out.push_str(json.key);
                    json.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                return Err(JinjaError::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: cannot write {kind} as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn group(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), JinjaError>,
    ) -> Result<(), JinjaError> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(self.item);
            }
            self.line(depth);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth - 1);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, s: &str) {
        self.out.push('"');
        for c in s.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                _ if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Today as `YYYY-MM-DD`: the date of the options, or the clock's (UTC).
pub(super) fn today(date: Option<&str>) -> String {
    match date {
        Some(date) => date.to_owned(),
        None => {
            let (year, month, day) = civil(days_now());
            format!("{year:04}-{month:02}-{day:02}")
        }
    }
}

fn days_now() -> i64 {
    (since_epoch().as_secs() / 86_400) as i64
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant's civil_from_days).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// The day, counted from 1970-01-01, of a date.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let y = year - i64::from(month <= 2);
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

/// Whether it is a day of the calendar, as `YYYY-MM-DD`.
pub fn is_date(text: &str) -> bool {
    text.len() == 10 && text.chars().all(|c| c.is_ascii_digit() || c == '-') && day_of(text).is_some()
}

/// The day of a date.
fn day_of(date: &str) -> Option<i64> {
    let parts: Option<Vec<i64>> = date.split('-').map(|p| p.parse::<u16>().ok().map(i64::from)).collect();
    let &[y, m, d] = parts.as_deref()? else { return None };
    Some(days_of(y, m, d)).filter(|days| civil(*days) == (y, m, d))
}

/// The parts of `strftime` that templates use. A date given by the options is at midnight.
fn strftime(format: &str, date: Option<&str>) -> Result<String, JinjaError> {
    let invalid = |what: String| JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: {what}"));
    let (days, seconds) = match date {
        None => (days_now(), since_epoch().as_secs() % 86_400),
        Some(date) => {
            let unread = || invalid(format!("the date {date:?} is not YYYY-MM-DD"));
            (day_of(date).ok_or_else(unread)?, 0)
        }
    };
    let (year, month, day) = civil(days);
    let months = "January February March April May June July August September October November December";
    let weekdays = "Thursday Friday Saturday Sunday Monday Tuesday Wednesday";
    let month_name = months.split(' ').nth(month as usize - 1).unwrap_or_default();
    let weekday = weekdays.split(' ').nth(days.rem_euclid(7) as usize).unwrap_or_default();
    let [hour, minute, second] = [seconds / 3600, seconds / 60 % 60, seconds % 60];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // `%-d`: without leading zeros.
        let mut code = chars.next();
        let bare = code == Some('-');
        if bare {
            code = chars.next();
        }
        let text = match code {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('j') => format!("{:03}", days - days_of(year, 1, 1) + 1),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            other => return Err(invalid(format!("%{} is not supported", other.map_or(String::new(), String::from)))),
        };
        let trimmed = text.trim_start_matches(['0', ' ']);
        out.push_str(if bare && trimmed.starts_with(|c: char| c.is_ascii_digit()) { trimmed } else { &text });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_strftime_does() {
        let format = "%Y-%m-%d|%d %b %Y|%B %-d, %Y|%A %a %j %y|%H:%M:%S %I %p|%%";
        let want = "2024-02-29|29 Feb 2024|February 29, 2024|Thursday Thu 060 24|00:00:00 12 AM|%";
        assert_eq!(strftime(format, Some("2024-02-29")).unwrap(), want);
        for date in ["2024-02-30", "2023-02-29", "", "today", "2024-1", "2024-13-01", "2024-00-01", "-1-1-1"] {
            assert!(strftime("%Y", Some(date)).is_err(), "{date}");
        }
        assert!(strftime("%", None).is_err() && strftime("%Q", None).is_err());
        assert_eq!((civil(0), civil(-1), civil(days_of(1600, 12, 31))), ((1970, 1, 1), (1969, 12, 31), (1600, 12, 31)));
        assert!(today(None).as_str() > "2024-01-01");
    }
}
