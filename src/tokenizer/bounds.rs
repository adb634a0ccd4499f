//! Bounds on what a chat template may build, which the template engine's own limit on steps does not give: `s ~ s` in
//! a short loop doubles a string forty times in two hundred steps.
//!
//! [`guarded`] writes a filter behind the operands of operators and before other filters; the filter returns its value
//! as it is, or an error where the value is large. Values that grow pass through one of these places.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// The largest value of a template, and the largest prompt, in bytes.
pub(super) const MAX_BYTES: usize = 8 << 20;
/// Template instructions per rendering. A real template takes some hundred per message.
const MAX_STEPS: u64 = 1_000_000;
/// Bytes that all operations of a rendering may pass on, together.
const MAX_WORK: u64 = 128 << 20;
/// The most items of one value, nested ones included.
const MAX_ITEMS: usize = 100_000;
/// What an item counts for beside its bytes.
const ITEM_BYTES: usize = 32;
/// The deepest nesting of a value.
const MAX_DEPTH: usize = 64;
/// Largest count, and longest text or list, that `*` takes.
const MAX_FACTOR: u64 = 16_384;
const MAX_REPEATED_BYTES: usize = 256;

const SIZED: &str = "__sized";
const LISTED: &str = "__listed";
/// Filters that go over a value's items but leave their bytes alone: templates ask `messages | length` at every message.
const LISTING: [&str; 10] =
    ["count", "d", "default", "first", "last", "length", "list", "rejectattr", "reverse", "selectattr"];
const FACTOR: &str = "__factor";
const CHAIN: &str = "__chain";
const COUNTED: &str = "__counted";
/// Longer stretches of plain text are counted too: a block may capture them again and again.
const MAX_PLAIN_BYTES: usize = 256;

/// Puts the bounds into an environment that renders templates from [`guarded`].
pub(super) fn install(env: &mut Environment<'_>) {
    let work = Arc::new(AtomicU64::new(0));
    env.set_fuel(Some(MAX_STEPS));
    env.set_recursion_limit(120);

    let w = work.clone();
    env.add_filter(SIZED, move |value: Value| w_sized(&w, &value).map(|_| value));
    let w = work.clone();
    env.add_filter(LISTED, move |value: Value| {
        let (bytes, items) = size(&value)?;
        check(bytes)?;
        count(&w, ((items + 1) * ITEM_BYTES) as u64).map(|()| value)
    });
    env.add_filter(FACTOR, |value: Value| factor(&value).map(|()| value));
    let w = work.clone();
    env.add_filter(COUNTED, move |value: Value, bytes: u64| count(&w, bytes).map(|()| value));
    env.add_filter(CHAIN, |_: Value| -> Result<Value, Error> {
        let reason = "a product or power in a longer one: put the inner one in parentheses";
        Err(Error::new(ErrorKind::InvalidOperation, reason))
    });
    let w = work.clone();
    env.set_formatter(move |out, state, value| {
        w_sized(&w, value)?;
        minijinja::escape_formatter(out, state, value)
    });
    let w = work.clone();
    env.set_unknown_method_callback(move |state, value, method, args| {
        w_sized(&w, value)?;
        for arg in args {
            w_sized(&w, arg)?;
        }
        let text = |at: usize| args.get(at).and_then(Value::as_str);
        match (value.as_str(), method) {
            (Some(s), "replace") => check_replace(s, text(0).unwrap_or_default(), text(1).unwrap_or_default())?,
            (Some(s), "join") => check_join(args.first(), s)?,
            (Some(s), "format") => check_format(s)?,
            _ => {}
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    env.add_filter("replace", |s: &Value, from: &Value, to: &Value, count: Option<usize>| {
        let [s, from, to] = [s, from, to].map(Value::to_string);
        check_replace(&s, &from, &to)?;
        Ok::<_, Error>(match count {
            Some(count) => s.replacen(&from, &to, count),
            None => s.replace(&from, &to),
        })
    });
    env.add_filter(
        "join",
        |state: &mut State<'_, '_>, v: &Value, by: Option<&Value>, attribute: Option<&str>, named: Kwargs| {
            let by = match by {
                Some(by) => by.to_string(),
                None => named.get::<Option<String>>("d")?.unwrap_or_default(),
            };
            check_join(Some(v), &by)?;
            let by = Value::from(by);
            let by = minijinja::value::StringInput::new(state, &by)?;
            minijinja::filters::join(state, v, Some(by), attribute, named)
        },
    );
    let indent = Value::from_function(minijinja::filters::indent);
    env.add_filter("indent", move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        let named = args.last().filter(|v| v.is_kwargs()).and_then(|v| v.get_attr("width").ok());
        let width = args.get(1).and_then(Value::as_usize).or(named.and_then(|v| v.as_usize())).unwrap_or(4);
        let lines = args.first().and_then(Value::as_str).map_or(0, |s| s.matches('\n').count() + 1);
        check(width.saturating_mul(lines))?;
        indent.call(state, &args)
    });
    let format = Value::from_function(minijinja::filters::format);
    env.add_filter("format", move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        check_format(args.first().and_then(Value::as_str).unwrap_or_default())?;
        format.call(state, &args)
    });
    // These build values of a size that an argument says, and no chat template needs them.
    for filter in ["batch", "slice", "sum"] {
        env.remove_filter(filter);
    }
}

fn too_large(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("the template builds {what}"))
}

fn check(bytes: usize) -> Result<(), Error> {
    match bytes <= MAX_BYTES {
        true => Ok(()),
        false => Err(too_large(&format!("a value of more than {} MiB", MAX_BYTES >> 20))),
    }
}

fn check_replace(s: &str, from: &str, to: &str) -> Result<(), Error> {
    let grown = if to.len() > from.len() { s.matches(from).count().saturating_mul(to.len() - from.len()) } else { 0 };
    check(s.len().saturating_add(grown))
}

fn check_join(values: Option<&Value>, by: &str) -> Result<(), Error> {
    let n = values.map_or(0, |v| v.len().unwrap_or(MAX_ITEMS));
    check(n.saturating_mul(by.len()))
}

fn check_format(format: &str) -> Result<(), Error> {
    let mut digits = 0;
    for c in format.chars() {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > 3 || c == '*' {
            return Err(too_large("a very wide format"));
        }
    }
    Ok(())
}

fn factor(value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number if value.is_integer() => match value.as_i64() {
            Some(n) if n.abs_diff(0) <= MAX_FACTOR => Ok(()),
            _ => Err(too_large(&format!("a product with more than {MAX_FACTOR}"))),
        },
        _ => match size(value)?.0 <= MAX_REPEATED_BYTES {
            true => Ok(()),
            false => Err(too_large(&format!("a repetition of more than {MAX_REPEATED_BYTES} bytes"))),
        },
    }
}

/// Counts a value that is about to be used: an error where it, or all so far, is too large.
fn w_sized(work: &AtomicU64, value: &Value) -> Result<(), Error> {
    let (bytes, _) = size(value)?;
    check(bytes)?;
    count(work, bytes as u64)
}

fn count(work: &AtomicU64, bytes: u64) -> Result<(), Error> {
    match work.fetch_add(bytes, Ordering::Relaxed) + bytes <= MAX_WORK {
        true => Ok(()),
        false => Err(too_large(&format!("more than {} MiB in all its steps", MAX_WORK >> 20))),
    }
}

/// A value's size in bytes, and its items, nested ones counted.
fn size(value: &Value) -> Result<(usize, usize), Error> {
    let mut items = 0;
    Ok((walk(value, 0, &mut items)?, items))
}

fn walk(value: &Value, depth: usize, items: &mut usize) -> Result<usize, Error> {
    if let Some(s) = value.as_str() {
        return Ok(s.len());
    }
    // An iterable of unknown length can be read once only, so it is not looked into.
    let len = match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => value.len().unwrap_or(0),
        _ => return Ok(ITEM_BYTES / 2),
    };
    if depth > MAX_DEPTH {
        return Err(too_large(&format!("a value nested more than {MAX_DEPTH} deep")));
    }
    let mut bytes = ITEM_BYTES;
    if len == 0 {
        return Ok(bytes);
    }
    if len > MAX_ITEMS {
        return Err(too_large(&format!("a list of more than {MAX_ITEMS} items")));
    }
    for item in value.try_iter()? {
        *items += 1;
        if *items > MAX_ITEMS {
            return Err(too_large(&format!("a list of more than {MAX_ITEMS} items")));
        }
        bytes = bytes.saturating_add(ITEM_BYTES).saturating_add(walk(&item, depth + 1, items)?);
        if value.kind() == ValueKind::Map
            && let Ok(of_key) = value.get_item(&item)
        {
            bytes = bytes.saturating_add(walk(&of_key, depth + 1, items)?);
        }
    }
    Ok(bytes)
}

/// The template with the bounds written in. Line numbers stay; where the source is malformed, so is the result. The
/// error is the place of plain text that no bound can be written into.
pub(super) fn guarded(source: &str) -> Result<String, usize> {
    let mut out = String::with_capacity(source.len() * 2);
    let mut at = 0;
    while at < source.len() {
        let rest = &source[at..];
        let plain = (0..rest.len()).find(|&i| matches!(rest.as_bytes().get(i..i + 2), Some(b"{#" | b"{{" | b"{%")));
        let plain = plain.unwrap_or(rest.len());
        write_plain(&mut out, &rest[..plain]).ok_or(at)?;
        at += plain;
        let rest = &source[at..];
        at += match rest.get(..2) {
            Some("{#") => {
                let end = rest.find("#}").map_or(rest.len(), |end| end + 2);
                out.push_str(&rest[..end]);
                end
            }
            Some(opened) => {
                let (tokens, mut end) = lex(rest, if opened == "{{" { "}}" } else { "%}" });
                if opened == "{%" && matches!(&tokens[..], [t] if t.text(rest) == "raw") {
                    let begin = end;
                    end = end_of_raw(rest).unwrap_or(rest.len());
                    if end - begin > MAX_PLAIN_BYTES {
                        return Err(at);
                    }
                    out.push_str(&rest[..end]);
                } else {
                    write_guarded(&mut out, &rest[..end], &tokens, opened == "{%");
                }
                end
            }
            None => 0,
        };
    }
    Ok(out)
}

/// Plain text; where it is long, with its count in the middle of a word, where no white space is trimmed.
fn write_plain(out: &mut String, text: &str) -> Option<()> {
    if text.len() <= MAX_PLAIN_BYTES {
        out.push_str(text);
        return Some(());
    }
    let word = text.as_bytes().windows(2).position(|w| w.iter().all(u8::is_ascii_alphanumeric))?;
    let (head, tail) = text.split_at(word + 1);
    out.push_str(head);
    out.push_str(&format!("{{{{ ''|{COUNTED}({}) }}}}", text.len()));
    out.push_str(tail);
    Some(())
}

fn end_of_raw(source: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + source[from..].find("{%")?;
        let (tokens, len) = lex(&source[at..], "%}");
        if matches!(&tokens[..], [t] if t.text(&source[at..]) == "endraw") {
            return Some(at + len);
        }
        from = at + 2;
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Name,
    Literal,
    Operator,
}

#[derive(Clone, Copy)]
struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

impl Token {
    fn text<'a>(&self, source: &'a str) -> &'a str {
        &source[self.start..self.end]
    }
}

/// The tokens of a block that starts with `{{` or `{%`, and where it ends.
fn lex(source: &str, close: &str) -> (Vec<Token>, usize) {
    let mut tokens = Vec::new();
    let mut depth = 0usize;
    let mut at = 2;
    // The sign of whitespace control belongs to the bracket.
    if matches!(source.as_bytes().get(at), Some(b'-' | b'+')) {
        at += 1;
    }
    while let Some(c) = source[at..].chars().next() {
        let rest = &source[at..];
        if depth == 0 {
            if rest.starts_with(close) {
                return (tokens, at + 2);
            }
            if (c == '-' || c == '+') && rest[1..].starts_with(close) {
                return (tokens, at + 3);
            }
        }
        let (kind, len) = match c {
            _ if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Literal, string_len(rest, c)),
            _ if c.is_ascii_digit() => (Kind::Literal, number_len(rest)),
            _ if c.is_alphanumeric() || c == '_' => {
                (Kind::Name, rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len()))
            }
            _ => {
                match c {
                    '(' | '[' | '{' => depth += 1,
                    ')' | ']' | '}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                let two = ["**", "//", "==", "!=", "<=", ">="].iter().any(|op| rest.starts_with(op));
                (Kind::Operator, if two { 2 } else { c.len_utf8() })
            }
        };
        tokens.push(Token { kind, start: at, end: at + len });
        at += len;
    }
    (tokens, source.len())
}

fn string_len(source: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in source.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    source.len()
}

fn number_len(source: &str) -> usize {
    let bytes = source.as_bytes();
    let mut len = 1;
    while let Some(&c) = bytes.get(len) {
        let point = c == b'.' && bytes.get(len + 1).is_some_and(u8::is_ascii_digit);
        if !(c.is_ascii_alphanumeric() || c == b'_' || point) {
            break;
        }
        len += 1;
    }
    len
}

fn write_guarded(out: &mut String, block: &str, tokens: &[Token], statement: bool) {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text(block));
    let mut marks: BTreeSet<(usize, &str)> = BTreeSet::new();
    // Ends of right operands of the operators that bind like `*` or tighter, and whether the operator was `*` or `**`.
    let mut factors: HashMap<usize, bool> = HashMap::new();
    let mut renamed = None;
    if statement {
        // transformers' marks around what an assistant wrote: a scope without further meaning here.
        renamed = match (text(0), tokens.len()) {
            ("generation", 1) => Some("with"),
            ("endgeneration", 1) => Some("endwith"),
            _ => None,
        };
    }
    let mut for_in = statement && text(0) == "for";
    let mut depth = 0usize;
    for (i, token) in tokens.iter().enumerate() {
        let word = token.text(block);
        match word {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if token.kind == Kind::Literal || i == 0 {
            continue;
        }
        let guard = match word {
            "*" | "**" | "/" | "//" | "%" => FACTOR,
            "|" if LISTING.contains(&text(i + 1)) => LISTED,
            "+" | "~" | "==" | "!=" | "<" | "<=" | ">" | ">=" | "|" => SIZED,
            "in" => {
                if std::mem::take(&mut for_in) && depth == 0 {
                    continue;
                }
                if matches!(text(i - 1), "is" | ".") || (text(i - 1) == "not" && i > 1 && text(i - 2) == "is") {
                    continue;
                }
                SIZED
            }
            _ => continue,
        };
        let left = if word == "in" && text(i - 1) == "not" { i.checked_sub(2) } else { i.checked_sub(1) };
        let Some(left) = left.filter(|&left| ends_operand(block, tokens, left)) else {
            continue; // a sign, not an operator
        };
        let (left, right) = (tokens[left].end, end_of_operand(block, tokens, i + 1).filter(|_| word != "|"));
        if guard == FACTOR {
            let repeats = word.starts_with('*');
            if factors.get(&left).is_some_and(|&before| before || repeats) {
                marks.insert((left, CHAIN));
            }
            factors.extend(right.map(|end| (end, repeats)));
            if !repeats {
                continue;
            }
        }
        marks.extend([Some(left), right].into_iter().flatten().map(|end| (end, guard)));
    }
    let mut at = 0;
    if let (Some(name), Some(token)) = (renamed, tokens.first()) {
        out.push_str(&block[..token.start]);
        out.push_str(name);
        at = token.end;
    }
    for (end, guard) in marks {
        out.push_str(&block[at..end]);
        out.push('|');
        out.push_str(guard);
        at = end;
    }
    out.push_str(&block[at..]);
}

/// Whether an operand can end with token `i`, so that what follows is an operator between two.
fn ends_operand(block: &str, tokens: &[Token], i: usize) -> bool {
    let word = tokens[i].text(block);
    match tokens[i].kind {
        Kind::Literal => true,
        Kind::Operator => matches!(word, ")" | "]" | "}"),
        Kind::Name => {
            let attribute = i > 0 && tokens[i - 1].text(block) == ".";
            attribute || !matches!(word, "in" | "and" | "or" | "not" | "if" | "else" | "elif" | "is" | "recursive")
        }
    }
}

/// Where the operand that starts with token `i` ends: a primary with its attributes, subscripts, calls and filters.
fn end_of_operand(block: &str, tokens: &[Token], mut i: usize) -> Option<usize> {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text(block));
    while matches!(text(i), "not" | "-" | "+") {
        i += 1;
    }
    i = after_group(block, tokens, i)?;
    loop {
        match text(i) {
            "." => i += 2,
            "(" | "[" => i = after_group(block, tokens, i)?,
            "|" => i += 2,
            _ => break,
        }
    }
    Some(tokens.get(i.checked_sub(1)?)?.end)
}

/// The token after the one at `i`, or after the bracket that it opens.
fn after_group(block: &str, tokens: &[Token], mut i: usize) -> Option<usize> {
    let mut depth = 0usize;
    loop {
        match tokens.get(i)?.text(block) {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.checked_sub(1)?,
            _ => {}
        }
        i += 1;
        if depth == 0 {
            return Some(i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::guarded;

    #[test]
    fn guards_stand_behind_operands_and_before_filters() {
        let cases = [
            ("{{ a + b.c[1:](x) ~ 'x' }}", "{{ a|S + b.c[1:](x)|S ~ 'x'|S }}"),
            ("{{- -1 + 2 -}} + ~", "{{- -1|S + 2|S -}} + ~"),
            ("{% for a, b in c if d in e %}", "{% for a, b in c if d|S in e|S %}"),
            ("{%- if not 'x' not in y and z is not in w -%}", "{%- if not 'x'|S not in y|S and z is not in w -%}"),
            ("{{ x|length + y|d(1) }}", "{{ x|L|length|S + y|L|d(1)|S }}"),
            ("{{ x|f(a=1)|g }}", "{{ x|S|f(a=1)|S|g }}"),
            ("{{ 'a' * 3 + 4 * n / 2 % 3 }}", "{{ 'a'|F * 3|F|S + 4|F|S * n|C|F / 2 % 3 }}"),
            ("{{ 'a' * 10 ** 8 }}", "{{ 'a'|F * 10|C|F ** 8|F }}"),
            ("{{ {'a': {'b': 1 + 1}} }}", "{{ {'a': {'b': 1|S + 1|S}} }}"),
            ("{% raw %}{{ a + b }}{% endraw %}{{ 1 }}", "{% raw %}{{ a + b }}{% endraw %}{{ 1 }}"),
            ("{# a + b #}{ a + b }", "{# a + b #}{ a + b }"),
            ("{%- generation -%}{% endgeneration %}", "{%- with -%}{% endwith %}"),
            ("{% set x | trim %}", "{% set x|S | trim %}"),
            ("{{ '}}' + \"\\\"}}\" }}", "{{ '}}'|S + \"\\\"}}\"|S }}"),
            ("{{ a + ", "{{ a|S + "),
        ];
        for (source, want) in cases {
            let got = guarded(source)
                .unwrap()
                .replace("__sized", "S")
                .replace("__factor", "F")
                .replace("__chain", "C")
                .replace("__listed", "L");
            assert_eq!(got, want, "{source}");
        }
        let long = "x ".repeat(200) + "{{ 1 }}";
        assert_eq!(guarded(&long), Err(0));
        let got = guarded(&format!("\nab {long}")).unwrap();
        assert_eq!(got, format!("\na{{{{ ''|__counted(404) }}}}b {long}"));
    }
}
