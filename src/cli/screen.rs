//! An answer on stdout: reasoning apart from the answer on a terminal, the answer alone in a pipe.

use super::terminal::{self, Paint};
use fourfold::Piece;
use fourfold::tokenizer::harmony::Channel;
use std::io::{self, IsTerminal, Write};

/// Writes the pieces of one answer.
pub(super) struct Screen {
    paint: Paint,
    on_terminal: bool,
    show_reasoning: bool,
    open: Option<Channel>,
    /// Text was left out.
    hid: bool,
    /// The last thing written was a whole line.
    at_line_start: bool,
}

impl Screen {
    /// `show_reasoning`: in a pipe too.
    pub(super) fn new(show_reasoning: bool) -> Self {
        let on_terminal = io::stdout().is_terminal();
        let paint = Paint(terminal::styled(&io::stdout()));
        Self { paint, on_terminal, show_reasoning, open: None, hid: false, at_line_start: true }
    }

    /// Write a piece at once.
    pub(super) fn show(&mut self, piece: &Piece) -> io::Result<()> {
        let reasoning = reasoning(&piece.channel);
        if reasoning.is_some() && !self.on_terminal && !self.show_reasoning {
            self.hid |= !piece.text.is_empty();
            return Ok(());
        }
        let mut out = io::stdout().lock();
        if self.open.as_ref() != Some(&piece.channel) {
            self.turn(&mut out, reasoning)?;
            self.open = Some(piece.channel.clone());
        }
        let text = if self.on_terminal { terminal::printable(&piece.text) } else { (&piece.text).into() };
        out.write_all(text.as_bytes())?;
        self.at_line_start = text.ends_with('\n') || (text.is_empty() && self.at_line_start);
        out.flush()
    }

    /// End the open channel and head the next: reasoning under its name, the answer plain after a blank line.
    fn turn(&self, out: &mut impl Write, reasoning: Option<&str>) -> io::Result<()> {
        let paint = self.paint;
        if self.open.is_some() {
            let end = if self.at_line_start { "\n" } else { "\n\n" };
            write!(out, "{}{end}", paint.plain())?;
        }
        match reasoning {
            Some(name) => writeln!(out, "{}[{}]", paint.dim(), terminal::printable(name)),
            None if self.show_reasoning && !self.on_terminal => writeln!(out, "[final]"),
            None => Ok(()),
        }
    }

    /// End the answer: styles off, the last line whole.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if self.open.is_none() {
            return Ok(());
        }
        let end = if self.at_line_start { "" } else { "\n" };
        let mut out = io::stdout().lock();
        write!(out, "{}{end}", self.paint.plain())?;
        out.flush()
    }

    /// There was text, and all of it was left out.
    pub(super) fn hid_everything(&self) -> bool {
        self.hid && self.open.is_none()
    }
}

/// The channel's name, where it is not the answer. Text on no channel is what the model has to say, so it is shown.
fn reasoning(channel: &Channel) -> Option<&str> {
    match channel {
        Channel::Analysis => Some("analysis"),
        Channel::Commentary => Some("commentary"),
        Channel::Other(name) => Some(name),
        Channel::Final | Channel::None => None,
    }
}
