//! Stop strings in a stream of text: what may be shown, what must wait, when to stop.

/// Finds the first of several stop strings in text that comes in pieces, and holds back text that may be the beginning
/// of one. How the text is cut into pieces changes neither what is shown in all nor where it stops.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    hit: bool,
}

impl StopStrings {
    /// A matcher for `stops`. Empty strings are left out: they would stop before the first word.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        Self { stops, held: String::new(), hit: false }
    }

    /// Takes the next piece of text. Returns what is now safe to show, and whether a stop string has been completed:
    /// then it and all that follows is dropped, and further calls show nothing.
    ///
    /// If several stop strings are in the text, the one that is complete first counts, the longest of those that are
    /// complete at the same character.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.hit {
            return (String::new(), true);
        }
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|s| self.held.find(s).map(|start| (start + s.len(), start))).min();
        if let Some((_, start)) = found {
            self.hit = true;
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(start);
            return (shown, true);
        }
        let may_begin_a_stop = |from: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*from..]));
        let wait = self.held.char_indices().map(|(i, _)| i).find(may_begin_a_stop).unwrap_or(self.held.len());
        let waiting = self.held.split_off(wait);
        (std::mem::replace(&mut self.held, waiting), false)
    }

    /// The text has ended: returns what was held back, which did not become a stop string after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str]) -> StopStrings {
        StopStrings::new(stops.iter().map(|s| s.to_string()).collect())
    }

    /// All that is shown when `text` comes in `pieces` characters at a time, and whether it stopped.
    fn shown(stops: &[&str], text: &str, pieces: usize) -> (String, bool) {
        let mut matcher = matcher(stops);
        let chars: Vec<char> = text.chars().collect();
        let (mut all, mut hit) = (String::new(), false);
        for piece in chars.chunks(pieces) {
            let (text, stop) = matcher.push(&piece.iter().collect::<String>());
            all += &text;
            hit |= stop;
        }
        (all + &matcher.finish(), hit)
    }

    #[test]
    fn text_that_may_begin_a_stop_waits() {
        let mut m = matcher(&["</s>"]);
        assert_eq!(m.push("a<"), ("a".into(), false));
        assert_eq!(m.push("/"), ("".into(), false));
        assert_eq!(m.push("b</"), ("</b".into(), false));
        assert_eq!(m.push("s>after"), ("".into(), true));
        assert_eq!(m.push("more"), ("".into(), true));
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn what_waits_at_the_end_is_shown() {
        let mut m = matcher(&["END"]);
        assert_eq!(m.push("the EN"), ("the ".into(), false));
        assert_eq!(m.finish(), "EN");
    }

    #[test]
    fn cutting_the_text_changes_nothing() {
        let cases: [(&[&str], &str, &str, bool); 9] = [
            (&["aab"], "aaab!", "a", true),         // the second a begins the match, not the first
            (&["abab", "abc"], "ababc", "", true),  // complete first
            (&["bc", "abcd"], "xabcd", "xa", true), // bc is complete before abcd
            (&["bcd", "abcd"], "xabcd", "x", true), // same end: the longest
            (&["ababac"], "abababac-", "ab", true), // overlaps itself
            (&["…»"], "un «mot…», puis…» fin", "un «mot", true),
            (&["🙂🙃"], "🙂🙂🙃", "🙂", true),
            (&["🙃"], "🙂 é 你", "🙂 é 你", false),
            (&["", "\n\n"], "one\ntwo\n", "one\ntwo\n", false), // the empty stop is left out
        ];
        for (stops, text, want, hit) in cases {
            for pieces in 1..=text.chars().count() {
                assert_eq!(shown(stops, text, pieces), (want.to_owned(), hit), "{stops:?} in {text:?} by {pieces}");
            }
        }
    }

    #[test]
    fn without_stops_nothing_waits() {
        assert_eq!(matcher(&[]).push("text"), ("text".into(), false));
    }
}
