//! Drafters that know the reply that they draft for, and what they make of it.

use crate::harness::Random;
use fourfold::speculate::Drafter;
use fourfold::tokenizer::TokenId;
use fourfold::{Error, Result};

/// A drafter that knows the reply.
#[derive(Clone, Debug)]
pub struct Knows {
    /// What plain decoding drew.
    pub reply: Vec<TokenId>,
    /// The second likeliest token in each place.
    pub second: Vec<TokenId>,
    pub how: How,
    pub random: Random,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    Right,
    Wrong,
    /// The second likeliest: right where the draw made it so.
    NearTie,
    /// Right, but for one token in three or so.
    Mixed,
    Random,
    Empty,
    /// Right, and as many as there are.
    OverLong,
    /// One that is right, then no token, then right ones.
    Illegal,
    /// Any of these, each time another.
    Any,
    /// By an error.
    Fails,
}

/// All that propose something of their own.
pub const ALL: [How; 8] =
    [How::Right, How::Wrong, How::NearTie, How::Mixed, How::Random, How::Empty, How::OverLong, How::Illegal];

impl Drafter for Knows {
    fn propose(&mut self, history: &[TokenId], n_prompt: usize, most: usize) -> Result<Vec<TokenId>> {
        let at = (history.len() - n_prompt).min(self.reply.len());
        let right = &self.reply[at..];
        let (random, wrong) = (&mut self.random, |id: &TokenId| (id + 1) % 500);
        let how = if self.how == How::Any { ALL[random.below(ALL.len())] } else { self.how };
        Ok(match how {
            How::Right => right.iter().take(most).copied().collect(),
            How::Wrong => right.iter().take(most).map(wrong).collect(),
            How::NearTie => self.second[at..].iter().take(most).copied().collect(),
            How::Mixed => {
                right.iter().take(most).map(|id| if random.below(3) == 0 { wrong(id) } else { *id }).collect()
            }
            How::Random => (0..most).map(|_| random.below(500) as TokenId).collect(),
            How::Empty => Vec::new(),
            How::OverLong => [right, &vec![7; 1000]].concat(),
            How::Illegal => [&right[..right.len().min(1)], &[TokenId::MAX, 512, 70_000], right].concat(),
            How::Any | How::Fails => return Err(Error::Device("told to fail".to_owned())),
        })
    }
}

/// The second likeliest token, of equal ones the lowest id first.
pub fn second(logits: &[f32]) -> TokenId {
    let mut ranked: Vec<(f32, TokenId)> = logits.iter().copied().zip(0..).collect();
    ranked.select_nth_unstable_by(1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))).1.1
}
