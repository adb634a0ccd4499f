//! Names of modules as quantisers list them: exact names, `*` globs, `re:` patterns, and the class `Linear`.
//!
//! The lists come from strangers: how many patterns there may be, how long they are and how much work one of them may
//! cause are all bounded.

use std::collections::HashMap;

use fancy_regex::{Regex, RegexBuilder};

/// The longest name or pattern.
const MAX_LENGTH: usize = 1024;
const MAX_GLOBS: usize = 1024;
const MAX_REGEXES: usize = 256;
/// Steps back that one match may take before it is given up.
const BACKTRACK_LIMIT: usize = 10_000;
/// Bytes that one compiled pattern may take.
const SIZE_LIMIT: usize = 256 << 10;

/// What an entry is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// The module's own name, as in compressed-tensors; `*` is no wildcard there.
    Own,
    /// The name of the module or of anything that it is part of; `*`, `?` and `[...]` are wildcards, as in Python's
    /// `fnmatch`, that also match dots.
    OwnAndParents,
}

/// A list of names, each with a number that the lister gave it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Names {
    reach: Reach,
    exact: HashMap<String, usize>,
    globs: Vec<(String, usize)>,
    regexes: Vec<(Pattern, usize)>,
    linear: Option<usize>,
}

#[derive(Clone, Debug)]
struct Pattern(Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Names {
    pub(super) fn new(reach: Reach) -> Self {
        Self { reach, exact: HashMap::new(), globs: Vec::new(), regexes: Vec::new(), linear: None }
    }

    /// Adds an entry. The error says what is wrong with it.
    pub(super) fn add(&mut self, entry: &str, number: usize) -> Result<(), String> {
        if entry.is_empty() || entry.len() > MAX_LENGTH {
            return Err(format!("an entry has {} bytes, should have 1 to {MAX_LENGTH}", entry.len()));
        }
        if let Some(pattern) = entry.strip_prefix("re:") {
            if self.regexes.len() == MAX_REGEXES {
                return Err(format!("has more than {MAX_REGEXES} patterns that begin with re:"));
            }
            // Python's re.match: anchored at the start only.
            let compiled = RegexBuilder::new(&format!(r"\A(?:{pattern})"))
                .backtrack_limit(BACKTRACK_LIMIT)
                .delegate_size_limit(SIZE_LIMIT)
                .delegate_dfa_size_limit(SIZE_LIMIT)
                .build();
            let compiled = compiled.map_err(|e| format!("{entry:?} is not a pattern that can be read: {e}"))?;
            self.regexes.push((Pattern(compiled), number));
        } else if self.reach == Reach::OwnAndParents && entry.contains(['*', '?', '[']) {
            if self.globs.len() == MAX_GLOBS {
                return Err(format!("has more than {MAX_GLOBS} patterns"));
            }
            self.globs.push((entry.to_owned(), number));
        } else if matches!(entry, "Linear" | "nn.Linear") {
            self.linear.get_or_insert(number);
        } else {
            self.exact.entry(entry.to_owned()).or_insert(number);
        }
        Ok(())
    }

    /// The number of the entry that fits a linear module best: its exact name, then its nearest parent's, then the
    /// first glob, the first pattern, the class. The error says which pattern was given up.
    pub(super) fn find(&self, module: &str) -> Result<Option<usize>, String> {
        self.search(module, |slow| Err(format!("the pattern {slow:?} takes too long on {module:?}")))
    }

    /// As [`Names::find`], but a pattern that takes too long fits nothing, and those after it are tried.
    pub(super) fn find_in_time(&self, module: &str) -> Option<usize> {
        self.search(module, |_| Ok(())).unwrap_or_default()
    }

    /// `give_up` is asked whether the search ends at a pattern that takes too long.
    fn search(&self, module: &str, give_up: impl Fn(&str) -> Result<(), String>) -> Result<Option<usize>, String> {
        let names = || {
            let parents = module.rmatch_indices('.').map(|(dot, _)| &module[..dot]);
            std::iter::once(module).chain(parents.filter(|_| self.reach == Reach::OwnAndParents))
        };
        if let Some(number) = names().find_map(|name| self.exact.get(name)) {
            return Ok(Some(*number));
        }
        let fits = |glob: &str| names().any(|name| glob_fits(glob.as_bytes(), name.as_bytes()));
        if let Some((_, number)) = self.globs.iter().find(|(glob, _)| fits(glob)) {
            return Ok(Some(*number));
        }
        for (Pattern(regex), number) in &self.regexes {
            match regex.is_match(module) {
                Ok(true) => return Ok(Some(*number)),
                Ok(false) => {}
                Err(_) => give_up(regex.as_str())?,
            }
        }
        Ok(self.linear)
    }
}

/// Whether the whole of `text` fits a glob: `*` any run, `?` any byte, `[a-z]` and `[!a-z]` a byte of a set. After a
/// mismatch only the last `*` is tried again, so the work is at most the product of the two lengths.
fn glob_fits(glob: &[u8], text: &[u8]) -> bool {
    let (mut g, mut t) = (0, 0);
    let mut last_star = None;
    loop {
        let step = match glob.get(g) {
            Some(b'*') => {
                last_star = Some((g + 1, t));
                g += 1;
                continue;
            }
            None if t == text.len() => return true,
            None => None,
            Some(_) => text.get(t).and_then(|byte| one_fits(&glob[g..], *byte)),
        };
        match (step, last_star) {
            (Some(length), _) => (g, t) = (g + length, t + 1),
            (None, Some((after, from))) if from < text.len() => {
                last_star = Some((after, from + 1));
                (g, t) = (after, from + 1);
            }
            (None, _) => return false,
        }
    }
}

/// How many bytes of the glob stand for `byte`, if they fit it. The glob is not empty and does not begin with a star.
fn one_fits(glob: &[u8], byte: u8) -> Option<usize> {
    let (first, rest) = glob.split_first()?;
    match first {
        b'?' => return Some(1),
        b'[' => {}
        literal => return (*literal == byte).then_some(1),
    }
    let negated = rest.first() == Some(&b'!');
    let set = if negated { &rest[1..] } else { rest };
    // A bracket that comes first is an element; without a closing one, `[` is an ordinary character.
    let Some(end) = set.iter().skip(1).position(|b| *b == b']').map(|i| i + 1) else {
        return (byte == b'[').then_some(1);
    };
    let (mut i, mut found) = (0, false);
    while i < end {
        if i + 2 < end && set[i + 1] == b'-' {
            found |= (set[i]..=set[i + 2]).contains(&byte);
            i += 3;
        } else {
            found |= set[i] == byte;
            i += 1;
        }
    }
    (found != negated).then_some(1 + usize::from(negated) + end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(reach: Reach, entries: &[&str]) -> Names {
        let mut names = Names::new(reach);
        entries.iter().enumerate().for_each(|(i, entry)| names.add(entry, i).unwrap());
        names
    }

    #[test]
    fn globs_are_those_of_fnmatch() {
        // Expected values from Python 3.11: fnmatch.fnmatchcase(text, glob).
        for (glob, text, fits) in [
            ("*", "", true),
            ("a*", "a.b.c", true),
            ("*.attn.*", "layers.0.attn.wq_a", true),
            ("*.attn.*", "layers.0.attn", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("layers.[0-4].mlp*", "layers.3.mlp.gate", true),
            ("layers.[0-4].mlp*", "layers.5.mlp.gate", false),
            ("layers.[!0-4].mlp", "layers.5.mlp", true),
            ("[]]x", "]x", true),
            ("[x", "[x", true),
            ("*a*b*c", "xaxbxc", true),
            ("*a*b*c", "xaxbxcx", false),
            ("lm_head", "lm_head2", false),
        ] {
            assert_eq!(glob_fits(glob.as_bytes(), text.as_bytes()), fits, "{glob} {text}");
        }
        assert!(!glob_fits(b"*a*a*a*a*a*a*a*a*a*a*b", "a".repeat(1000).as_bytes()));
    }

    #[test]
    fn parents_count_where_they_should() {
        let list = names(Reach::OwnAndParents, &["model.layers.0.mlp.gate", "lm_head", "model.layers.*.self_attn"]);
        for (module, found) in [
            ("model.layers.0.mlp.gate", Some(0)),
            ("model.layers.0.mlp.gate.inner", Some(0)),
            ("model.layers.0.mlp.gate_proj", None),
            ("lm_head", Some(1)),
            ("model.layers.7.self_attn.q_proj", Some(2)),
            ("model.layers.7.self_attn_q", None),
        ] {
            assert_eq!(list.find(module).unwrap(), found, "{module}");
        }
        let list = names(Reach::Own, &["model.layers.0.mlp", "a*"]);
        assert_eq!(list.find("model.layers.0.mlp.gate").unwrap(), None);
        assert_eq!((list.find("a*").unwrap(), list.find("ab").unwrap()), (Some(1), None));
    }

    #[test]
    fn patterns_match_from_the_start_and_names_come_first() {
        let list = names(Reach::Own, &["Linear", r"re:.*mlp\.gate$", "re:model.layers", "model.layers.1.x"]);
        assert_eq!(list.find("model.layers.0.mlp.gate").unwrap(), Some(1));
        assert_eq!(list.find("model.layers.0.mlp.gate_proj").unwrap(), Some(2));
        assert_eq!(list.find("model.layers.1.x").unwrap(), Some(3));
        assert_eq!(list.find("a.model.layers").unwrap(), Some(0));
        let either = names(Reach::Own, &["re:a|b"]);
        assert_eq!((either.find("bc").unwrap(), either.find("cb").unwrap()), (Some(0), None));
    }

    #[test]
    fn hostile_lists_are_errors_and_soon() {
        let mut list = Names::new(Reach::OwnAndParents);
        for bad in ["", "re:(", &"a".repeat(1025)] {
            list.add(bad, 0).unwrap_err();
        }
        list.add(&format!("re:{}a{}", "(".repeat(500), ")".repeat(500)), 0).unwrap_err();
        // Whether it is found out at once or given up, it ends.
        for slow in [
            r"re:(?=(a+)+$)((a+)+)+\1?$",
            r"re:(a)(?:\1?){4000000000}",
            r"re:(?:\1?){4000000}(a)",
            "re:(?=a)(?:a?(?!c)){2000000000}",
            "re:(?=a)(?:(?:a??(?!c)){2000000000}){2000000000}",
            "re:(?=a)(?:(?:(?!c)a*)*)*c",
            "re:a{1000}{1000}{1000}",
        ] {
            let start = std::time::Instant::now();
            let mut list = Names::new(Reach::Own);
            if list.add(slow, 0).is_ok()
                && let Err(text) = list.find(&format!("{}b", "a".repeat(60)))
            {
                assert!(text.contains("takes too long"), "{text}");
            }
            assert!(start.elapsed().as_secs() < 2, "{slow}");
        }
        let mut many = Names::new(Reach::Own);
        let added = (0..1000).map(|i| many.add(&format!("re:{i}"), i)).collect::<Result<Vec<_>, _>>();
        assert!(added.unwrap_err().contains("more than 256"));
    }
}
