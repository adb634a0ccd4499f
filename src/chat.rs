//! A conversation: messages in, pieces of text out, the cache reused from turn to turn.

use crate::engine::Session;
use crate::error::{Error, Result};
use crate::reply::{Finish, Reply, ReplyOptions, Stats};
use crate::sampler::StopStrings;
use crate::tokenizer::{Channel, ChatOptions, Event, Harmony, HarmonyParser, Message};
use std::collections::VecDeque;

/// A session with the messages that were exchanged in it.
#[derive(Debug)]
pub struct Chat {
    session: Session,
    messages: Vec<Message>,
    options: ChatOptions,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which channel it belongs to; [`Channel::Final`] where the model has none.
    pub channel: Channel,
    /// Whole characters.
    pub text: String,
}

impl Chat {
    /// An empty conversation. Fails if the checkpoint has no chat format.
    pub fn new(session: Session, options: ChatOptions) -> Result<Self> {
        session.engine().chat_format()?;
        Ok(Self { session, messages: Vec::new(), options })
    }

    /// The messages so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Put a message into the conversation without answering it (`system`, or an earlier exchange).
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Forget all messages but the leading system ones.
    pub fn clear(&mut self) {
        let kept = self.messages.iter().take_while(|m| m.role == "system" || m.role == "developer").count();
        self.messages.truncate(kept);
    }

    /// Give the session back.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// The session underneath.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Answer a user's message. When the answer is dropped, what was said of it joins the conversation; if nothing was
    /// said, neither does the message.
    pub fn ask(&mut self, text: &str, options: &ReplyOptions) -> Result<Answer<'_>> {
        self.messages.push(Message::new("user", text));
        let engine = self.session.engine().clone();
        let prompt = engine
            .tokenizer()
            .and_then(|tokenizer| engine.chat_format()?.prompt(tokenizer, &self.messages, &self.options));
        // Stop strings belong to the answer's text, not to headers and channels: they are looked for there.
        let (stops, options) = (options.stop.clone(), ReplyOptions { stop: Vec::new(), ..options.clone() });
        let reply = prompt.and_then(|prompt| self.session.reply(&prompt, &options));
        let reply = match reply {
            Ok(reply) => reply,
            Err(e) => {
                self.messages.pop();
                return Err(e);
            }
        };
        let tokenizer = engine.tokenizer()?;
        let parser = Harmony::new(tokenizer).is_ok().then(|| HarmonyParser::new(tokenizer));
        Ok(Answer {
            reply: reply.marking(),
            parser,
            stops: StopStrings::new(stops),
            messages: &mut self.messages,
            said: Message::new("assistant", ""),
            held: Channel::Final,
            ready: VecDeque::new(),
            failed: None,
            stopped: false,
            over: false,
        })
    }
}

/// An answer being drawn: an iterator of pieces. Drop it to stop.
#[derive(Debug)]
pub struct Answer<'c> {
    reply: Reply<'c>,
    parser: Option<HarmonyParser>,
    stops: StopStrings,
    messages: &'c mut Vec<Message>,
    said: Message,
    /// The channel of the text that `stops` holds back.
    held: Channel,
    ready: VecDeque<Piece>,
    failed: Option<Error>,
    /// Whether a stop string ended it.
    stopped: bool,
    over: bool,
}

impl Answer<'_> {
    /// What it took so far.
    pub fn stats(&self) -> Stats {
        self.reply.stats()
    }

    /// Why the drawing of tokens ended, if it has; `None` also where the model began another role's message.
    pub fn finish(&self) -> Option<Finish> {
        if self.stopped { Some(Finish::StopString) } else { self.reply.finish() }
    }

    /// Draw one token and queue the pieces that it completes.
    fn draw(&mut self) -> Result<()> {
        let drawn = self.reply.next().transpose();
        let token = drawn.as_ref().ok().and_then(Option::as_ref);
        let last = token.is_none_or(|t| t.finish.is_some());
        let mut events = Vec::new();
        match &mut self.parser {
            None => {
                let text = token.map_or_else(|| self.reply.take_rest(), |t| t.text.clone());
                events.push(Event::Text { channel: Channel::Final, recipient: None, text });
            }
            Some(parser) => {
                if let Some(token) = token {
                    events = parser.push(token.choice.id);
                }
                if last {
                    events.extend(parser.finish());
                }
                self.over |= parser.stopped();
            }
        }
        self.over |= last;
        for event in events {
            if let Event::Text { channel, recipient, text } = event
                && self.queue(channel, recipient.is_some(), &text)
            {
                (self.over, self.stopped) = (true, true);
                return drawn.map(drop);
            }
        }
        if self.over {
            self.flush();
        }
        drawn.map(drop)
    }

    /// Queue text up to a stop string, and say whether one was met. Only the answer is searched for them: reasoning, and
    /// what is said to a tool, is not.
    fn queue(&mut self, channel: Channel, to_tool: bool, text: &str) -> bool {
        let is_answer = !to_tool && matches!(channel, Channel::Final | Channel::None);
        if !is_answer || self.held != channel {
            self.flush();
        }
        if !is_answer {
            self.show(channel, text);
            return false;
        }
        self.held = channel.clone();
        let (text, hit) = self.stops.push(text);
        self.said.content.push_str(&text);
        self.show(channel, &text);
        hit
    }

    /// Queue what was held back for a stop string that did not come.
    fn flush(&mut self) {
        let text = self.stops.finish();
        self.said.content.push_str(&text);
        self.show(self.held.clone(), &text);
    }

    fn show(&mut self, channel: Channel, text: &str) {
        if channel == Channel::Analysis {
            self.said.thinking.get_or_insert_default().push_str(text);
        }
        if !text.is_empty() {
            self.ready.push_back(Piece { channel, text: text.to_owned() });
        }
    }
}

impl Iterator for Answer<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            if let Some(e) = self.failed.take() {
                return Some(Err(e));
            }
            if self.over {
                return None;
            }
            if let Err(e) = self.draw() {
                self.over = true;
                self.failed = Some(e); // after what was said before it
            }
        }
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        if self.said.content.is_empty() && self.said.thinking.is_none() {
            self.messages.pop(); // nothing was said: the question was not asked
        } else {
            self.messages.push(self.said.clone());
        }
    }
}
