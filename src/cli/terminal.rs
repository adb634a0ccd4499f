//! What terminals need: styles only where they are wanted, text that cannot command them, the progress bar, tables.

use indicatif::{ProgressBar, ProgressStyle};
use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

/// Whether a stream gets styles: a terminal that is not dumb, and no NO_COLOR.
pub(super) fn styled(stream: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Styles, or nothing.
#[derive(Clone, Copy)]
pub(super) struct Paint(pub(super) bool);

impl Paint {
    /// What follows is dim.
    pub(super) fn dim(self) -> &'static str {
        if self.0 { "\x1b[2m" } else { "" }
    }

    /// What follows is bold.
    pub(super) fn bold(self) -> &'static str {
        if self.0 { "\x1b[1m" } else { "" }
    }

    /// What follows is plain again.
    pub(super) fn plain(self) -> &'static str {
        if self.0 { "\x1b[0m" } else { "" }
    }
}

/// A line on stderr. Where nobody reads stderr any more, there is nobody to tell.
pub(super) fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The text with control characters shown instead of sent: models, files and drivers do not command the terminal.
pub(super) fn printable(text: &str) -> Cow<'_, str> {
    let harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(harmful) {
        Cow::Owned(text.chars().map(|c| if harmful(c) { '\u{fffd}' } else { c }).collect())
    } else {
        Cow::Borrowed(text)
    }
}

/// The bar of a load, on stderr; invisible where that is no terminal or `quiet` is asked for.
pub(super) fn loading(quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("loading {wide_bar} {binary_bytes} of {binary_total_bytes}");
    ProgressBar::new(0).with_style(style.expect("the template is right"))
}

/// `20.2 MiB`.
pub(super) fn bytes(n: u64) -> String {
    fourfold::model::size(n)
}

/// `25.0 M`.
pub(super) fn count(n: u64) -> String {
    let step = (n.max(1).ilog10() / 3).min(4);
    if step == 0 {
        n.to_string()
    } else {
        format!("{:.1} {}", n as f64 / 1000f64.powi(step as i32), ["", "k", "M", "G", "T"][step as usize])
    }
}

/// `21,202,912`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let comma = |i: usize| i > 0 && (digits.len() - i).is_multiple_of(3);
    digits.chars().enumerate().flat_map(|(i, c)| comma(i).then_some(',').into_iter().chain([c])).collect()
}

/// Rows under a head, in columns two spaces apart; a column whose head starts with `>` is set to the right.
pub(super) fn table(out: &mut impl Write, paint: Paint, head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let titles: Vec<&str> = head.iter().map(|title| title.trim_start_matches('>')).collect();
    let length = |text: &str| text.chars().count();
    let cells = |i: usize| rows.iter().map(move |row| length(&row[i]));
    let width = |i: usize| cells(i).chain([length(titles[i])]).max().unwrap_or_default();
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[&str]| {
        let mut text = String::new();
        for (i, cell) in row.iter().enumerate() {
            let gap = " ".repeat(widths[i] - length(cell));
            text += if i > 0 { "  " } else { "" };
            text += &if head[i].starts_with('>') { gap + cell } else { (*cell).to_owned() + &gap };
        }
        text.trim_end().to_owned()
    };
    writeln!(out, "  {}{}{}", paint.dim(), line(&titles), paint.plain())?;
    for row in rows {
        writeln!(out, "  {}", printable(&line(&row.iter().map(String::as_str).collect::<Vec<_>>())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!([0, 1023, 1024, 21_202_912].map(bytes), ["0 bytes", "1023 bytes", "1.0 KiB", "20.2 MiB"]);
        assert_eq!([0, 999, 25_040_000].map(count), ["0", "999", "25.0 M"]);
        assert_eq!([0, 999, 1000, 21_202_912].map(grouped), ["0", "999", "1,000", "21,202,912"]);
    }

    #[test]
    fn terminals_get_no_commands() {
        assert_eq!(printable("a\tb\nç 🦊"), "a\tb\nç 🦊");
        assert_eq!(printable("\x1b[2J\u{9b}\r"), "\u{fffd}[2J\u{fffd}\u{fffd}");
    }

    #[test]
    fn columns_line_up() {
        let mut out = Vec::new();
        let rows = [vec!["a".to_owned(), "10".to_owned()], vec!["long".to_owned(), "7".to_owned()]];
        table(&mut out, Paint(false), &["name", ">n"], &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "  name   n\n  a     10\n  long   7\n");
    }
}
