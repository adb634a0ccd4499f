//! Harmony, gpt-oss's conversation format: messages → token ids as openai-harmony 0.0.8 writes them, and a reply's
//! tokens → channels, text, tool calls and the end of the turn as they arrive.
//!
//! A message is `<|start|>role to=recipient<|channel|>channel <|constrain|>type<|message|>content<|end|>`.

use serde_json::Value;

use super::chat::{ChatOptions, Message, Reasoning, today};
use super::{TokenId, Tokenizer, Utf8Stream};
use crate::error::{Error, Result};

/// Writes conversations. Holds the ids of the control tokens.
#[derive(Debug, Clone)]
pub struct Harmony {
    start: TokenId,
    channel: TokenId,
    constrain: TokenId,
    message: TokenId,
    end: TokenId,
    call: TokenId,
}

/// One message as Harmony knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HarmonyMessage {
    /// `system`, `developer`, `user`, `assistant`, or a tool's name (`functions.get_weather`).
    pub role: String,
    /// Who is addressed: a tool by the assistant, `assistant` by a tool.
    pub recipient: Option<String>,
    /// `analysis`, `commentary` or `final`.
    pub channel: Option<String>,
    /// Such as `<|constrain|>json`.
    pub content_type: Option<String>,
    /// The text. For system and developer messages see [`SystemContent`] and [`DeveloperContent`].
    pub content: String,
}

impl HarmonyMessage {
    /// A message to all, on no channel.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
    }

    /// The same on a channel.
    pub fn on(mut self, channel: &str) -> Self {
        self.channel = Some(channel.to_owned());
        self
    }

    /// The same to a recipient.
    pub fn to(mut self, recipient: &str) -> Self {
        self.recipient = Some(recipient.to_owned());
        self
    }

    /// The same with a content type.
    pub fn typed(mut self, content_type: &str) -> Self {
        self.content_type = Some(content_type.to_owned());
        self
    }
}

/// What a system message says: who the model is and how it should answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemContent {
    /// The first line.
    pub identity: String,
    /// `YYYY-MM`.
    pub knowledge_cutoff: Option<String>,
    /// `YYYY-MM-DD`.
    pub current_date: Option<String>,
    /// Reasoning effort.
    pub reasoning: Reasoning,
    /// Whether the developer message offers functions.
    pub function_tools: bool,
}

impl Default for SystemContent {
    fn default() -> Self {
        Self {
            identity: "You are ChatGPT, a large language model trained by OpenAI.".into(),
            knowledge_cutoff: Some("2024-06".into()),
            current_date: None,
            reasoning: Reasoning::Medium,
            function_tools: false,
        }
    }
}

impl SystemContent {
    /// The message's text.
    pub fn text(&self) -> String {
        let mut text = self.identity.clone();
        for (name, value) in [("Knowledge cutoff", &self.knowledge_cutoff), ("Current date", &self.current_date)] {
            if let Some(value) = value {
                text += &format!("\n{name}: {value}");
            }
        }
        text += &format!("\n\nReasoning: {}\n\n", self.reasoning.as_str());
        text += "# Valid channels: analysis, commentary, final. Channel must be included for every message.";
        if self.function_tools {
            text += "\nCalls to these tools must go to the commentary channel: 'functions'.";
        }
        text
    }
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// Its name, without namespace.
    pub name: String,
    /// What it does.
    pub description: String,
    /// JSON Schema of its one object argument.
    pub parameters: Option<Value>,
}

/// What a developer message says: what users call the system prompt, and the functions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeveloperContent {
    /// Instructions to the model.
    pub instructions: Option<String>,
    /// Functions that it may call.
    pub functions: Vec<Function>,
}

impl DeveloperContent {
    /// The message's text.
    pub fn text(&self) -> String {
        let mut sections = Vec::new();
        if let Some(instructions) = &self.instructions {
            sections.extend(["# Instructions".to_owned(), instructions.clone()]);
        }
        if !self.functions.is_empty() {
            let mut lines = vec!["## functions\n".to_owned(), "namespace functions {\n".to_owned()];
            for function in &self.functions {
                lines.extend(function.description.lines().map(|line| format!("// {line}")));
                let argument = function.parameters.as_ref().map(|p| format!("_: {}", typescript(p, "", 0)));
                lines.push(format!("type {} = ({}) => any;\n", function.name, argument.unwrap_or_default()));
            }
            lines.push("} // namespace functions".to_owned());
            sections.extend(["# Tools".to_owned(), lines.join("\n")]);
        }
        sections.join("\n\n")
    }
}

impl Harmony {
    /// Looks up the control tokens; a tokenizer without them cannot write Harmony.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let id = |name: &str| {
            tokenizer.token_id(name).filter(|&id| tokenizer.is_special(id)).ok_or_else(|| Error::Text {
                what: "tokenizer".into(),
                reason: format!("it has no special token {name}, which the Harmony format needs"),
            })
        };
        Ok(Self {
            start: id("<|start|>")?,
            channel: id("<|channel|>")?,
            constrain: id("<|constrain|>")?,
            message: id("<|message|>")?,
            end: id("<|end|>")?,
            call: id("<|call|>")?,
        })
    }

    /// The prompt's tokens: a system message, the conversation, and the start of the assistant's reply. What users call
    /// the system prompt becomes the developer message; the assistant's earlier reasoning is left out.
    pub fn prompt(&self, tokenizer: &Tokenizer, messages: &[Message], options: &ChatOptions) -> Result<Vec<TokenId>> {
        let system = SystemContent {
            current_date: Some(today(options.date.as_deref())),
            reasoning: options.reasoning.unwrap_or(Reasoning::Medium),
            ..SystemContent::default()
        };
        let mut conversation = vec![HarmonyMessage::new("system", system.text())];
        let mut messages = messages.iter().peekable();
        while let Some(message) = messages.next() {
            conversation.push(match message.role.as_str() {
                "system" | "developer" => {
                    let mut instructions = message.content.clone();
                    while let Some(more) = messages.next_if(|m| matches!(m.role.as_str(), "system" | "developer")) {
                        instructions += "\n\n";
                        instructions += &more.content;
                    }
                    let content = DeveloperContent { instructions: Some(instructions), functions: Vec::new() };
                    HarmonyMessage::new("developer", content.text())
                }
                "user" => HarmonyMessage::new("user", &message.content),
                "assistant" => HarmonyMessage::new("assistant", &message.content).on("final"),
                tool if tool.contains('.') => {
                    HarmonyMessage::new(tool, &message.content).to("assistant").on("commentary")
                }
                other => {
                    return Err(Error::Text {
                        what: "messages".into(),
                        reason: format!(
                            "unknown role {other:?}: Harmony has system, developer, user, assistant and tools (functions.NAME)"
                        ),
                    });
                }
            });
        }
        self.render(tokenizer, &conversation)
    }

    /// The tokens of a conversation and of the start of the assistant's reply. Analysis from before the first final
    /// message is left out where the assistant's last message is final.
    pub fn render(&self, tokenizer: &Tokenizer, conversation: &[HarmonyMessage]) -> Result<Vec<TokenId>> {
        let is_final = |m: &HarmonyMessage| m.channel.as_deref() == Some("final");
        let answered = conversation.iter().rev().find(|m| m.role == "assistant").is_some_and(is_final);
        let first_final = conversation.iter().position(is_final).filter(|_| answered).unwrap_or(0);
        let mut ids = Vec::new();
        for (i, message) in conversation.iter().enumerate() {
            if i >= first_final || message.channel.as_deref() != Some("analysis") {
                self.write(tokenizer, message, &mut ids)?;
            }
        }
        ids.push(self.start);
        ids.extend(tokenizer.encode("assistant")?);
        Ok(ids)
    }

    fn write(&self, tokenizer: &Tokenizer, message: &HarmonyMessage, ids: &mut Vec<TokenId>) -> Result<()> {
        let recipient = message.recipient.as_deref().filter(|&r| r != "all");
        ids.push(self.start);
        ids.extend(tokenizer.encode(&message.role)?);
        if let Some(recipient) = recipient {
            ids.extend(tokenizer.encode(&format!(" to={recipient}"))?);
        }
        if let Some(channel) = &message.channel {
            ids.push(self.channel);
            ids.extend(tokenizer.encode(channel)?);
        }
        if let Some(content_type) = &message.content_type {
            match content_type.strip_prefix("<|constrain|>") {
                Some(name) => {
                    ids.extend(tokenizer.encode(" ")?);
                    ids.push(self.constrain);
                    ids.extend(tokenizer.encode(name)?);
                }
                None => ids.extend(tokenizer.encode(&format!(" {content_type}"))?),
            }
        }
        ids.push(self.message);
        ids.extend(tokenizer.encode(&message.content)?);
        let calls = message.role == "assistant" && message.recipient.is_some();
        ids.push(if calls { self.call } else { self.end });
        Ok(())
    }
}

/// The deepest schema that is written out; below stands `any`.
const MAX_SCHEMA_DEPTH: usize = 32;

/// A JSON Schema as a TypeScript type, line for line as openai-harmony writes it.
fn typescript(schema: &Value, indent: &str, depth: usize) -> String {
    if depth > MAX_SCHEMA_DEPTH {
        return "any".into();
    }
    let array = |key: &str| schema.get(key).and_then(Value::as_array);
    if let Some(variants) = array("oneOf") {
        let variant = |v: &Value| {
            let comments: Vec<String> =
                text(v, "description").map(str::to_owned).into_iter().chain(default_of_variant(v)).collect();
            let comments = if comments.is_empty() { String::new() } else { format!(" // {}", comments.join(" ")) };
            format!("\n{indent} | {}{comments}", nullable(v, typescript(v, &format!("{indent}   "), depth + 1)))
        };
        return variants.iter().map(variant).collect();
    }
    let name = |t: &str| if t == "integer" { "number".to_owned() } else { t.to_owned() };
    let names: Vec<String> = array("type").into_iter().flatten().filter_map(Value::as_str).map(name).collect();
    if !names.is_empty() {
        return names.join(" | ");
    }
    match text(schema, "type") {
        Some("object") => object(schema, indent, depth),
        Some("string") => {
            let values = array("enum").into_iter().flatten().filter_map(Value::as_str);
            let values: Vec<String> = values.map(|v| format!("\"{v}\"")).collect();
            if values.is_empty() { "string".into() } else { values.join(" | ") }
        }
        Some("number" | "integer") => "number".into(),
        Some("boolean") => "boolean".into(),
        Some("array") => match schema.get("items") {
            Some(items) => format!("{}[]", typescript(items, indent, depth + 1)),
            None => "Array<any>".into(),
        },
        _ => "any".into(),
    }
}

fn object(schema: &Value, indent: &str, depth: usize) -> String {
    let mut out = String::new();
    if let Some(description) = text(schema, "description") {
        out += &format!("{indent}// {description}\n");
    }
    out += "{\n";
    let required = schema.get("required").and_then(Value::as_array);
    for (key, value) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let optional = if required.is_some_and(|r| r.iter().any(|name| name == key)) { "" } else { "?" };
        if let Some(title) = text(value, "title") {
            out += &format!("{indent}// {title}\n{indent}//\n");
        }
        let description = text(value, "description");
        if let (Some(description), None) = (description, value.get("oneOf")) {
            out += &format!("{indent}// {description}\n");
        }
        let examples = value.get("examples").and_then(Value::as_array).filter(|e| !e.is_empty());
        if let Some(examples) = examples {
            out += &format!("{indent}// Examples:\n");
            for example in examples.iter().filter_map(Value::as_str) {
                out += &format!("{indent}// - \"{example}\"\n");
            }
        }
        if let Some(variants) = value.get("oneOf").and_then(Value::as_array) {
            out += &one_of(key, optional, value, variants, indent, depth);
            continue;
        }
        let kind = nullable(value, typescript(value, &format!("{indent}    "), depth + 1));
        out += &format!("{indent}{key}{optional}: {kind},");
        if let (Some(default), None) = (default(value), value.get("oneOf")) {
            out += &format!(" // {default}");
        }
        out += "\n";
    }
    out + indent + "}"
}

/// A property with variants, one line each; the property's description stands once.
fn one_of(key: &str, optional: &str, value: &Value, variants: &[Value], indent: &str, depth: usize) -> String {
    let mut out = String::new();
    let description = text(value, "description");
    let first = variants.first().and_then(|v| text(v, "description"));
    let above = description.filter(|d| first != Some(*d));
    if let Some(description) = above {
        out += &format!("{indent}// {description}\n");
    }
    if let Some(default) = default(value) {
        out += &format!("{indent}// {default}\n");
    }
    out += &format!("{indent}{key}{optional}:\n");
    for (i, variant) in variants.iter().enumerate() {
        let kind = nullable(variant, typescript(variant, &format!("{indent}   "), depth + 1));
        out += &format!("{indent} | {kind}");
        let own = text(variant, "description").filter(|d| !(i == 0 && above.is_some()) && description != Some(*d));
        let comments: Vec<String> = own.map(str::to_owned).into_iter().chain(default(variant)).collect();
        if !comments.is_empty() {
            out += &format!(" // {}", comments.join(" "));
        }
        out += "\n";
    }
    out + indent + ",\n"
}

fn text<'a>(schema: &'a Value, key: &str) -> Option<&'a str> {
    schema.get(key).and_then(Value::as_str)
}

fn nullable(schema: &Value, kind: String) -> String {
    let nullable = schema.get("nullable").and_then(Value::as_bool).unwrap_or(false);
    if nullable && !kind.contains("null") { kind + " | null" } else { kind }
}

/// What stands beside a property that has a default; among enumerated strings it is written without quotes.
fn default(schema: &Value) -> Option<String> {
    let default = schema.get("default")?;
    Some(match default.as_str() {
        Some(s) if is_enum(schema) => format!("default: {s}"),
        Some(s) => format!("default: \"{s}\""),
        None => format!("default: {default}"),
    })
}

/// The same beside a variant that belongs to no property: always in quotes.
fn default_of_variant(schema: &Value) -> Option<String> {
    if is_enum(schema) { schema.get("default").map(|d| format!("default: {d}")) } else { default(schema) }
}

fn is_enum(schema: &Value) -> bool {
    schema.get("enum").and_then(Value::as_array).is_some_and(|values| !values.is_empty())
}

/// The channel that a message of a reply is on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Reasoning, not for the user.
    Analysis,
    /// Tool calls and what is said before them.
    Commentary,
    /// The answer.
    Final,
    /// A channel that the format does not name.
    Other(String),
    /// Text outside any channel: the reply did not keep to the format.
    None,
}

impl Channel {
    fn new(name: &str) -> Self {
        match name {
            "analysis" => Self::Analysis,
            "commentary" => Self::Commentary,
            "final" => Self::Final,
            "" => Self::None,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// Why a reply ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// `<|return|>`: the answer is complete.
    Return,
    /// `<|call|>`: a tool is to be called with the last message.
    Call,
    /// `<|endoftext|>`.
    EndOfText,
    /// The model began another role's message: its turn is over.
    OtherRole(String),
    /// The tokens ended inside a header.
    Cut,
}

/// What the tokens of a reply mean. `raw` is the text of the tokens that became this event: the `raw`s and texts of all
/// events together spell every token of the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message begins.
    Start {
        /// Its channel.
        channel: Channel,
        /// Whom it addresses: a tool, where it is a call.
        recipient: Option<String>,
        /// The type of its text (`json`).
        content_type: Option<String>,
        /// The header's tokens.
        raw: String,
    },
    /// More of a message's text: whole characters.
    Text {
        /// The message's channel.
        channel: Channel,
        /// The message's recipient.
        recipient: Option<String>,
        /// The text.
        text: String,
    },
    /// The message is complete (`<|end|>`); another may follow.
    End {
        /// `<|end|>`.
        raw: String,
    },
    /// The turn is over, and with it the open message: nothing follows.
    Stop {
        /// Why.
        reason: StopReason,
        /// The tokens that ended it.
        raw: String,
    },
}

/// Reads a reply that begins after `<|start|>assistant`, token by token. Any tokens will do: text that does not keep to
/// the format comes out as text on [`Channel::None`].
#[derive(Debug)]
pub struct HarmonyParser {
    tokenizer: Tokenizer,
    controls: [(Control, Option<TokenId>); 8],
    state: State,
    utf8: Utf8Stream,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Control {
    Start,
    Channel,
    Constrain,
    Message,
    End,
    Return,
    Call,
    EndOfText,
}

#[derive(Debug)]
enum State {
    Header(Header),
    Content { channel: Channel, recipient: Option<String> },
    Stopped,
}

/// A header that `<|message|>` has not ended yet.
#[derive(Debug, Default)]
struct Header {
    /// Control tokens and the bytes after each; the first stands for the text before any control token.
    parts: Vec<(Option<Control>, Vec<u8>)>,
    raw: Vec<u8>,
    tokens: usize,
}

/// Longer headers are text: nothing is held back for long.
const MAX_HEADER_TOKENS: usize = 64;

impl HarmonyParser {
    /// A parser at the start of a reply.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let id = |name: &str| tokenizer.token_id(name).filter(|&id| tokenizer.is_special(id));
        let controls = [
            (Control::Start, id("<|start|>")),
            (Control::Channel, id("<|channel|>")),
            (Control::Constrain, id("<|constrain|>")),
            (Control::Message, id("<|message|>")),
            (Control::End, id("<|end|>")),
            (Control::Return, id("<|return|>")),
            (Control::Call, id("<|call|>")),
            (Control::EndOfText, id("<|endoftext|>")),
        ];
        let state = State::Header(Header::default());
        Self { tokenizer: tokenizer.clone(), controls, state, utf8: Utf8Stream::default() }
    }

    /// Whether the turn is over; tokens pushed after that are ignored.
    pub fn stopped(&self) -> bool {
        matches!(self.state, State::Stopped)
    }

    /// Takes the next token of the reply.
    pub fn push(&mut self, id: TokenId) -> Vec<Event> {
        let mut events = Vec::new();
        let control = self.controls.iter().find(|(_, known)| *known == Some(id)).map(|(control, _)| *control);
        let bytes = self.tokenizer.token_bytes(id);
        match std::mem::replace(&mut self.state, State::Stopped) {
            State::Stopped => {}
            State::Header(header) => self.in_header(header, control, bytes, &mut events),
            State::Content { channel, recipient } => {
                self.state = State::Content { channel, recipient };
                self.in_content(control, bytes, &mut events);
            }
        }
        events
    }

    /// Ends a reply that was cut off, by a token limit for example: gives what was held back.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        match std::mem::replace(&mut self.state, State::Stopped) {
            State::Stopped => {}
            State::Header(header) => {
                let begun = header.parts.iter().any(|(control, _)| control.is_some());
                let raw = String::from_utf8_lossy(&header.raw).into_owned();
                if begun {
                    events.push(Event::Stop { reason: StopReason::Cut, raw });
                } else if !raw.is_empty() {
                    events.push(Event::Text { channel: Channel::None, recipient: None, text: raw });
                }
            }
            State::Content { channel, recipient } => {
                let text = self.utf8.finish();
                if !text.is_empty() {
                    events.push(Event::Text { channel, recipient, text });
                }
            }
        }
        events
    }

    fn in_header(&mut self, mut header: Header, control: Option<Control>, bytes: Vec<u8>, events: &mut Vec<Event>) {
        header.tokens += 1;
        match control {
            Some(Control::Message) => {
                header.raw.extend_from_slice(&bytes);
                self.begin(&header, events);
            }
            // The role is all that stood before the channel: enough to know whose message it is.
            Some(Control::Channel) if header.other_role().is_some() => {
                header.raw.extend_from_slice(&bytes);
                self.begin(&header, events);
            }
            Some(Control::Channel | Control::Constrain) => {
                header.add(control, &bytes);
                self.state = State::Header(header);
            }
            Some(Control::Start) if header.raw.is_empty() => {
                header.add(control, &bytes);
                self.state = State::Header(header);
            }
            // The header breaks off: it was text.
            Some(_) => {
                self.as_text(&header, events);
                self.in_content(control, bytes, events);
            }
            None => {
                header.add(None, &bytes);
                if header.plausible() {
                    self.state = State::Header(header);
                } else {
                    self.as_text(&header, events);
                }
            }
        }
    }

    fn begin(&mut self, header: &Header, events: &mut Vec<Event>) {
        let raw = String::from_utf8_lossy(&header.raw).into_owned();
        if let Some(role) = header.other_role() {
            events.push(Event::Stop { reason: StopReason::OtherRole(role), raw });
            self.state = State::Stopped;
            return;
        }
        let (channel, recipient, content_type) = header.read();
        self.utf8 = Utf8Stream::default();
        self.state = State::Content { channel: channel.clone(), recipient: recipient.clone() };
        events.push(Event::Start { channel, recipient, content_type, raw });
    }

    /// What looked like a header is the start of a message without one.
    fn as_text(&mut self, header: &Header, events: &mut Vec<Event>) {
        self.utf8 = Utf8Stream::default();
        self.state = State::Content { channel: Channel::None, recipient: None };
        self.text(&header.raw, events);
    }

    fn in_content(&mut self, control: Option<Control>, bytes: Vec<u8>, events: &mut Vec<Event>) {
        let spelled = String::from_utf8_lossy(&bytes).into_owned();
        let stop = match control {
            Some(Control::Return) => Some(StopReason::Return),
            Some(Control::Call) => Some(StopReason::Call),
            Some(Control::EndOfText) => Some(StopReason::EndOfText),
            Some(Control::End) => None,
            // The message was not ended: its header may follow all the same.
            Some(Control::Start) => {
                self.flush(events);
                self.in_header(Header::default(), control, bytes, events);
                return;
            }
            // Inside a message these mean nothing.
            Some(Control::Channel | Control::Constrain | Control::Message) | None => {
                self.text(&bytes, events);
                return;
            }
        };
        self.flush(events);
        match stop {
            Some(reason) => {
                events.push(Event::Stop { reason, raw: spelled });
                self.state = State::Stopped;
            }
            None => {
                events.push(Event::End { raw: spelled });
                self.state = State::Header(Header::default());
            }
        }
    }

    fn text(&mut self, bytes: &[u8], events: &mut Vec<Event>) {
        let text = self.utf8.push(bytes);
        if let (false, State::Content { channel, recipient }) = (text.is_empty(), &self.state) {
            events.push(Event::Text { channel: channel.clone(), recipient: recipient.clone(), text });
        }
    }

    fn flush(&mut self, events: &mut Vec<Event>) {
        let text = self.utf8.finish();
        if let (false, State::Content { channel, recipient }) = (text.is_empty(), &self.state) {
            events.push(Event::Text { channel: channel.clone(), recipient: recipient.clone(), text });
        }
    }
}

impl Header {
    fn add(&mut self, control: Option<Control>, bytes: &[u8]) {
        self.raw.extend_from_slice(bytes);
        match (control, self.parts.last_mut()) {
            (Some(_), _) => self.parts.push((control, Vec::new())),
            (None, Some((_, text))) => text.extend_from_slice(bytes),
            (None, None) => self.parts.push((None, bytes.to_vec())),
        }
    }

    /// Whether what came so far can become a header.
    fn plausible(&self) -> bool {
        if self.tokens > MAX_HEADER_TOKENS {
            return false;
        }
        match self.parts.first() {
            // Between the assistant's role and its channel there can be a recipient, nothing else.
            Some((None, text)) => {
                let text = text.trim_ascii_start();
                text.starts_with(b"to=") || b"to=".starts_with(text)
            }
            _ => true,
        }
    }

    fn texts(&self) -> impl Iterator<Item = (Option<Control>, String)> {
        self.parts.iter().map(|(control, text)| (*control, String::from_utf8_lossy(text).into_owned()))
    }

    /// The role after `<|start|>`, where it is not the assistant.
    fn other_role(&self) -> Option<String> {
        let (_, text) = self.texts().next().filter(|(control, _)| *control == Some(Control::Start))?;
        let role = text.split_whitespace().next()?;
        let assistant = role == "assistant" || role.starts_with("assistant:");
        (!assistant).then(|| role.to_owned())
    }

    fn read(&self) -> (Channel, Option<String>, Option<String>) {
        let (mut channel, mut recipient, mut content_type) = (Channel::None, None, None);
        for (control, text) in self.texts() {
            let skip = usize::from(control == Some(Control::Start));
            for word in text.split_whitespace().skip(skip) {
                if let Some(to) = word.strip_prefix("to=") {
                    recipient.get_or_insert(to.to_owned());
                } else if control == Some(Control::Channel) && channel == Channel::None {
                    channel = Channel::new(word);
                } else {
                    content_type.get_or_insert(word.to_owned());
                }
            }
        }
        (channel, recipient, content_type)
    }
}
