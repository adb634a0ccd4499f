//! An answer on stdout: reasoning apart from the answer on a terminal, the answer alone in a pipe.

use super::terminal::{self, Paint};
use fourfold::Piece;
use fourfold::tokenizer::harmony::Channel;
use std::io::{self, IsTerminal, Write};

/// Writes the pieces of one answer.
pub(super) struct Screen<W: Write> {
    out: W,
    look: Look,
    open: Option<Channel>,
    /// Text was left out.
    hid: bool,
    /// The last thing written was a whole line.
    at_line_start: bool,
}

/// What the other end of stdout is.
#[derive(Clone, Copy)]
struct Look {
    paint: Paint,
    on_terminal: bool,
    /// In a pipe too.
    show_reasoning: bool,
}

impl Screen<io::Stdout> {
    /// On stdout. `show_reasoning`: in a pipe too.
    pub(super) fn new(show_reasoning: bool) -> Self {
        let out = io::stdout();
        let look = Look { paint: Paint(terminal::styled(&out)), on_terminal: out.is_terminal(), show_reasoning };
        Self::on(out, look)
    }
}

impl<W: Write> Screen<W> {
    fn on(out: W, look: Look) -> Self {
        Self { out, look, open: None, hid: false, at_line_start: true }
    }

    /// Write a piece at once.
    pub(super) fn show(&mut self, piece: &Piece) -> io::Result<()> {
        let reasoning = reasoning(&piece.channel);
        if reasoning.is_some() && !self.look.on_terminal && !self.look.show_reasoning {
            self.hid |= !piece.text.is_empty();
            return Ok(());
        }
        if self.open.as_ref() != Some(&piece.channel) {
            self.turn(reasoning)?;
            self.open = Some(piece.channel.clone());
        }
        let text = if self.look.on_terminal { terminal::printable(&piece.text) } else { (&piece.text).into() };
        self.out.write_all(text.as_bytes())?;
        self.at_line_start = text.ends_with('\n') || (text.is_empty() && self.at_line_start);
        self.out.flush()
    }

    /// End the open channel, and head the next with its name; an answer that is alone or plain among dim text needs none.
    fn turn(&mut self, reasoning: Option<&str>) -> io::Result<()> {
        let Look { paint, on_terminal, .. } = self.look;
        if self.open.is_some() {
            let end = if self.at_line_start { "\n" } else { "\n\n" };
            write!(self.out, "{}{end}", paint.plain())?;
        }
        let in_pipe_with_names = !on_terminal && self.look.show_reasoning;
        match reasoning {
            Some(name) => writeln!(self.out, "{}[{}]", paint.dim(), terminal::printable(name)),
            None if in_pipe_with_names || (self.open.is_some() && !paint.0) => writeln!(self.out, "[final]"),
            None => Ok(()),
        }
    }

    /// End the answer: styles off, the last line whole.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if self.open.is_none() {
            return Ok(());
        }
        let end = if self.at_line_start { "" } else { "\n" };
        write!(self.out, "{}{end}", self.look.paint.plain())?;
        self.out.flush()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written of an answer with reasoning in two pieces, and whether all of it was hidden.
    fn written(look: Look, pieces: &[(Channel, &str)]) -> (String, bool) {
        let mut screen = Screen::on(Vec::new(), look);
        for (channel, text) in pieces {
            screen.show(&Piece { channel: channel.clone(), text: (*text).to_owned() }).unwrap();
        }
        screen.finish().unwrap();
        let hid_everything = screen.hid_everything();
        (String::from_utf8(screen.out).unwrap(), hid_everything)
    }

    #[test]
    fn reasoning_stands_apart() {
        let pieces =
            [(Channel::Analysis, "Hm"), (Channel::Analysis, ".\n"), (Channel::Final, "A\x1bb"), (Channel::Final, "c")];
        let terminal = Look { paint: Paint(true), on_terminal: true, show_reasoning: false };
        let want = "\x1b[2m[analysis]\nHm.\n\x1b[0m\nA\u{fffd}bc\x1b[0m\n";
        assert_eq!(written(terminal, &pieces).0, want);
        let plain = Look { paint: Paint(false), ..terminal };
        assert_eq!(written(plain, &pieces).0, "[analysis]\nHm.\n\n[final]\nA\u{fffd}bc\n");
        assert_eq!(written(plain, &pieces[2..]).0, "A\u{fffd}bc\n");
    }

    #[test]
    fn a_pipe_gets_the_answer_unless_it_asks_for_more() {
        let pieces = [(Channel::Analysis, "Hm."), (Channel::Other("x".to_owned()), "y"), (Channel::None, "A\x1bb\n")];
        let pipe = Look { paint: Paint(false), on_terminal: false, show_reasoning: false };
        assert_eq!(written(pipe, &pieces), ("A\x1bb\n".to_owned(), false));
        assert_eq!(written(pipe, &pieces[..2]), (String::new(), true));
        let all = Look { show_reasoning: true, ..pipe };
        assert_eq!(written(all, &pieces).0, "[analysis]\nHm.\n\n[x]\ny\n\n[final]\nA\x1bb\n");
    }
}
