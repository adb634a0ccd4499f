//! Prompt lookup: what followed the last time the text went like this.

use super::Drafter;
use crate::error::Result;
use crate::tokenizer::TokenId;

/// Tokens that must have occurred before, and that are compared at most.
const SHORTEST: usize = 2;
const LONGEST: usize = 8;

/// Finds the longest run of tokens at the end of the text (2 to 8) that occurred before, the latest such place where there
/// are several, and proposes what followed. Takes no memory and next to no time; good where a reply repeats its prompt,
/// as in editing and in quoting.
#[derive(Clone, Copy, Debug, Default)]
pub struct PromptLookup;

impl Drafter for PromptLookup {
    fn propose(&mut self, history: &[TokenId], _: usize, most: usize) -> Result<Vec<TokenId>> {
        let Some(from) = find(history) else { return Ok(Vec::new()) };
        // Where the text repeats itself up to its end, the proposal goes on with itself.
        let mut text = history.to_vec();
        text.reserve(most);
        for i in 0..most {
            text.push(text[from + i]);
        }
        Ok(text.split_off(history.len()))
    }
}

/// Where the text goes on after the earlier occurrence of its end.
fn find(history: &[TokenId]) -> Option<usize> {
    let mut best = (SHORTEST - 1, None);
    for end in (1..history.len()).rev() {
        let earlier = history[..end].iter().rev();
        let same = earlier.zip(history.iter().rev()).take(LONGEST).take_while(|(a, b)| a == b).count();
        if same > best.0 {
            best = (same, Some(end));
        }
        if same == LONGEST {
            break;
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propose(history: &[TokenId], most: usize) -> Vec<TokenId> {
        PromptLookup.propose(history, 0, most).unwrap()
    }

    #[test]
    fn the_longest_match_counts_and_of_equals_the_latest() {
        assert_eq!(propose(&[1, 2, 3, 4, 9, 1, 2], 2), [3, 4]);
        assert_eq!(propose(&[1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 1), [4], "the latest of two");
        assert_eq!(propose(&[7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], 1), [3], "three tokens count more than two");
        assert_eq!(propose(&[1, 2, 3, 9, 8, 2], 3), [0; 0], "one token is too little");
        assert_eq!(propose(&[1, 2, 3], 3), [0; 0]);
        assert_eq!(propose(&[], 3), [0; 0]);
        assert_eq!(propose(&[5, 6, 5, 6], 0), [0; 0]);
        // Beyond eight tokens a match is as good as any: the latest.
        let long: Vec<TokenId> = (10..20).collect();
        let text = [&long[..], &[1], &long[2..], &[2], &long[..]].concat();
        assert_eq!(propose(&text, 1), [2]);
    }

    #[test]
    fn a_loop_goes_on() {
        assert_eq!(propose(&[9, 5, 6, 5, 6], 5), [5, 6, 5, 6, 5]);
        assert_eq!(propose(&[4, 4, 4], 3), [4, 4, 4]);
    }
}
