//! The chat on a terminal: line editing, history, and a few commands that begin with a slash.

use super::Ending;
use super::run::{Run, new_seed};
use super::terminal::{self, Paint};
use fourfold::{Chat, Error};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const HELP: &str = "\
/help         this list
/clear        forget the conversation, keep the system text
/system TEXT  begin anew with this system text; without TEXT, with none
/exit         leave, as Ctrl-D does

Ctrl-C stops an answer; at the prompt, pressed twice, it leaves. Arrow keys edit and go back to earlier lines, Ctrl-R
searches them. A line that begins with a space is text, whatever follows.";

const HISTORY_LINES: usize = 1000;

/// A line of the user.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Help,
    Clear,
    Exit,
    System(&'a str),
    Unknown(&'a str),
    Text(&'a str),
}

impl<'a> Line<'a> {
    fn read(line: &'a str) -> Self {
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            _ if line.trim().is_empty() => Self::Nothing,
            "/help" | "/?" => Self::Help,
            "/clear" => Self::Clear,
            "/exit" | "/quit" => Self::Exit,
            "/system" => Self::System(rest.trim()),
            // A path is no command.
            _ if word.strip_prefix('/').is_some_and(|w| w.chars().all(char::is_alphabetic)) => Self::Unknown(word),
            _ => Self::Text(line.trim()),
        }
    }
}

pub(super) fn chat(mut run: Run<'_>) -> anyhow::Result<Ending> {
    let mut system = run.args.system.clone();
    let mut chat = Some(run.new_chat(system.as_deref())?);
    let config = Config::builder().max_history_size(HISTORY_LINES)?.auto_add_history(true).build();
    let mut editor: Editor<(), FileHistory> = Editor::with_config(config)?;
    let history = history_file();
    if let Some(file) = &history {
        load_history(&mut editor, file);
    }
    if !run.args.quiet {
        banner(&run)?;
    }
    let mut leaving = false;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof) => break,
            Err(ReadlineError::Interrupted) if leaving => break,
            Err(ReadlineError::Interrupted) => {
                leaving = true;
                terminal::note("Ctrl-C again, or Ctrl-D, leaves");
                continue;
            }
            // The conversation is worth more than a line.
            Err(ReadlineError::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
                terminal::note("that line is not UTF-8, so it was not read: check the terminal's encoding");
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        leaving = false;
        if let Some(file) = &history
            && let Err(e) = editor.append_history(file)
        {
            tracing::warn!("{}: the line was not kept: {e}", file.display());
        }
        match Line::read(&line) {
            Line::Nothing => {}
            Line::Help => terminal::note(HELP),
            Line::Exit => break,
            Line::Unknown(word) => terminal::note(&format!("{word} is no command; /help lists them")),
            Line::Clear => {
                chat.as_mut().expect("there is a chat between lines").clear();
                begin_anew(&mut run);
            }
            Line::System(text) => {
                system = Some(text.to_owned()).filter(|text| !text.is_empty());
                // The old one first: there may not be memory for two.
                drop(chat.take());
                chat = Some(run.new_chat(system.as_deref())?);
                begin_anew(&mut run);
            }
            Line::Text(text) => turn(&run, chat.as_mut().expect("there is a chat between lines"), text)?,
        }
    }
    Ok(Ending::Done)
}

/// One exchange. What concerns it alone is told, and the chat goes on.
fn turn(run: &Run<'_>, chat: &mut Chat, text: &str) -> anyhow::Result<()> {
    let Err(e) = run.stream(chat, text) else { return Ok(()) };
    match e.downcast_ref::<Error>() {
        Some(Error::ContextFull { .. }) => {
            terminal::note(&format!("{e}; /clear begins anew"));
            Ok(())
        }
        Some(Error::Text { .. }) => {
            terminal::note(&format!("error: {}", terminal::printable(&e.to_string())));
            Ok(())
        }
        _ => Err(e),
    }
}

/// A new conversation draws anew, unless the user chose the seed.
fn begin_anew(run: &mut Run<'_>) {
    run.seed = run.args.drawing.seed.unwrap_or_else(new_seed);
    if !run.args.quiet {
        terminal::note("a new conversation");
    }
}

fn banner(run: &Run<'_>) -> io::Result<()> {
    let paint = Paint(terminal::styled(&io::stdout()));
    let (dim, plain) = (paint.dim(), paint.plain());
    let engine = &run.engine;
    let (model, device, context) = (engine.name(), engine.device().describe(), engine.context());
    let head = format!("{model} on {device}, {context} tokens of context");
    writeln!(
        io::stdout(),
        "{}{}{plain}{dim} · /help for help, Ctrl-D to leave{plain}",
        paint.bold(),
        terminal::printable(&head)
    )?;
    if !run.args.has_model() {
        writeln!(
            io::stdout(),
            "{dim}A small model to try things with: it tells stories. What it states may be wrong.{plain}"
        )?;
    }
    Ok(())
}

/// Where lines are kept from run to run.
fn history_file() -> Option<PathBuf> {
    let dir = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|dir| dir.is_absolute());
    let data = if cfg!(windows) {
        dir("APPDATA")?
    } else {
        dir("XDG_DATA_HOME").or_else(|| Some(dir("HOME")?.join(".local/share")))?
    };
    Some(data.join("fourfold/history"))
}

fn load_history(editor: &mut Editor<(), FileHistory>, file: &Path) {
    if let Err(e) = create_private(file) {
        tracing::warn!("{}: lines will not be kept: {e}", file.display());
    } else if let Err(e) = editor.load_history(file) {
        tracing::warn!("{}: earlier lines cannot be read: {e}", file.display());
    }
}

/// Make the file if it is missing, with its folder, for the user's eyes only.
fn create_private(file: &Path) -> io::Result<()> {
    let mut folder = std::fs::DirBuilder::new();
    let mut options = std::fs::OpenOptions::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        folder.mode(0o700);
        options.mode(0o600);
    }
    folder.recursive(true).create(file.parent().expect("the file lies in our folder"))?;
    options.create(true).append(true).open(file).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_text() {
        assert_eq!(Line::read("  "), Line::Nothing);
        assert_eq!(Line::read("/help"), Line::Help);
        assert_eq!(Line::read("/clear "), Line::Clear);
        assert_eq!(Line::read("/quit"), Line::Exit);
        assert_eq!(Line::read("/system  Be brief. "), Line::System("Be brief."));
        assert_eq!(Line::read("/system"), Line::System(""));
        assert_eq!(Line::read("/sistem x"), Line::Unknown("/sistem"));
        assert_eq!(Line::read("/usr/bin is what?"), Line::Text("/usr/bin is what?"));
        assert_eq!(Line::read(" /help is a word"), Line::Text("/help is a word"));
        assert_eq!(Line::read("hello\n"), Line::Text("hello"));
    }
}
