//! What an element of a stage is (which head, expert, row of a weight), and what the elements that are apart share.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::config::Config;

/// One element, in the model's words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Place {
    /// The token's position in the run.
    pub position: usize,
    /// The token, where a trace says.
    pub token: Option<u32>,
    /// Index in the stage's row.
    pub column: usize,
    /// The expert that made it, in stages inside experts.
    pub expert: Option<i32>,
    /// Which of the token's experts that is, counted from 0 in A's order.
    pub slot: Option<usize>,
    /// Which output of the matrix: within the expert, where there is one.
    pub output: usize,
    /// The above in words.
    pub what: String,
    /// A's value.
    pub a: f32,
    /// B's value.
    pub b: f32,
}

/// What the elements that are apart share.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// How many elements are apart.
    pub elements: usize,
    /// The positions that they lie in.
    pub positions: Vec<usize>,
    /// The experts that made them, in stages inside experts.
    pub experts: Vec<i32>,
    /// The matrix's outputs that they are; at most [`LISTED`].
    pub outputs: Vec<usize>,
    /// The above in words.
    pub what: String,
}

/// Most outputs that a [`Spread`] lists.
pub const LISTED: usize = 64;

/// Experts of each position, in A's order.
pub(super) type Routes = BTreeMap<usize, Vec<i32>>;

/// What is needed to say what a column of a stage means.
pub(super) struct Anatomy<'a> {
    /// The stage, without its layer.
    pub(super) stage: &'a str,
    pub(super) width: usize,
    pub(super) config: Option<&'a Config>,
    pub(super) routes: Option<&'a Routes>,
}

/// What an element is.
pub(super) struct Part {
    pub(super) expert: Option<i32>,
    pub(super) slot: Option<usize>,
    pub(super) output: usize,
    /// Of q, k and v, and in attention: which and whose.
    head: Option<(&'static str, usize)>,
}

impl Anatomy<'_> {
    /// Experts per token, in stages that have a part for each.
    pub(super) fn slots(&self) -> Option<usize> {
        let per_expert = matches!(self.stage, "mlp.up" | "mlp.down" | "mlp.router.weights");
        let routes = self.routes.and_then(|routes| routes.values().next()).map(Vec::len);
        let slots = routes.or(self.config.map(|c| c.num_experts_per_tok)).filter(|n| *n > 0 && per_expert)?;
        self.width.is_multiple_of(slots).then_some(slots)
    }

    /// What the element at `column` of a position is.
    pub(super) fn part(&self, position: usize, column: usize) -> Part {
        if let Some(slots) = self.slots() {
            let (slot, output) = (column / (self.width / slots), column % (self.width / slots));
            let expert = self.routes.and_then(|r| r.get(&position)).and_then(|experts| experts.get(slot)).copied();
            return Part { expert, slot: Some(slot), output, head: None };
        }
        let head = self.heads().map(|c| {
            let (head, h, hk) = (column / c.head_dim, c.num_attention_heads, c.num_key_value_heads);
            match head {
                head if head < h => ("query", head),
                head if head < h + hk => ("key", head - h),
                head => ("value", head - h - hk),
            }
        });
        Part { expert: None, slot: None, output: column, head }
    }

    /// The same in words.
    pub(super) fn words(&self, part: &Part) -> String {
        let output = part.output;
        if let Some(slot) = part.slot {
            let whose = part.expert.map_or(format!("expert slot {slot}"), |e| format!("expert {e} (slot {slot})"));
            return match self.stage {
                "mlp.up" => format!("{whose}, row {output} (gate row {}, up row {})", 2 * output, 2 * output + 1),
                "mlp.down" => format!("{whose}, row {output}"),
                _ => whose,
            };
        }
        match (self.stage, part.head, self.heads()) {
            ("qkv", Some((kind, head)), Some(c)) => {
                format!("{kind} head {head}, dimension {} (row {output} of q, k, v)", output % c.head_dim)
            }
            (_, Some((_, head)), Some(c)) => {
                let shared = head / (c.num_attention_heads / c.num_key_value_heads);
                format!("head {head}, dimension {} (key and value head {shared})", output % c.head_dim)
            }
            ("mlp.router.logits", ..) => format!("expert {output}"),
            ("logits", ..) => format!("token id {output}"),
            _ => format!("channel {output}"),
        }
    }

    /// The configuration, in stages whose rows are heads.
    fn heads(&self) -> Option<&Config> {
        let heads = |c: &Config| match self.stage {
            "qkv" => c.num_attention_heads + 2 * c.num_key_value_heads,
            "attention" => c.num_attention_heads,
            _ => 0,
        };
        self.config.filter(|c| self.width == heads(c) * c.head_dim)
    }

    /// Where a position has `output` (of `expert`): the slot, and the column in the stage's row.
    pub(super) fn column_of(&self, position: usize, output: usize, expert: Option<i32>) -> Option<(usize, usize)> {
        let (Some(slots), Some(expert)) = (self.slots(), expert) else { return Some((0, output)) };
        let slot = self.routes?.get(&position)?.iter().position(|e| *e == expert)?;
        Some((slot, slot * (self.width / slots) + output))
    }

    /// What the elements share that `each` names by row and column; `positions` are those of all rows.
    pub(super) fn spread(&self, positions: &[usize], each: impl FnOnce(&mut dyn FnMut(usize, usize))) -> Spread {
        // A stage may have millions of elements, all of them apart.
        let (mut elements, mut rows, mut columns) = (0, vec![false; positions.len()], vec![false; self.width]);
        let (mut experts, mut heads) = (BTreeSet::new(), BTreeSet::new());
        each(&mut |row, column| {
            let part = self.part(positions[row], column);
            elements += 1;
            (rows[row], columns[part.output]) = (true, true);
            experts.extend(part.expert);
            heads.insert(part.head);
        });
        let apart: BTreeSet<usize> = positions.iter().zip(&rows).filter(|(_, is)| **is).map(|(p, _)| *p).collect();
        let outputs: BTreeSet<usize> = (0..self.width).filter(|output| columns[*output]).collect();
        let what = if elements == 0 {
            "no single element is far off: the error is spread over whole rows".to_owned()
        } else if !experts.is_empty() && self.stage != "mlp.router.weights" {
            self.inside_experts(&experts, &outputs, &apart)
        } else {
            self.plain(&outputs, &heads, &apart, positions)
        };
        Spread {
            elements,
            positions: apart.into_iter().collect(),
            experts: experts.into_iter().collect(),
            outputs: outputs.into_iter().take(LISTED).collect(),
            what,
        }
    }

    /// The positions that are routed to an expert.
    fn routed(&self, expert: i32) -> BTreeSet<usize> {
        let routes = self.routes.into_iter().flatten();
        routes.filter(|(_, experts)| experts.contains(&expert)).map(|(position, _)| *position).collect()
    }

    fn inside_experts(&self, experts: &BTreeSet<i32>, outputs: &BTreeSet<usize>, apart: &BTreeSet<usize>) -> String {
        let rows = match outputs.iter().next() {
            Some(row) if outputs.len() == 1 => format!("row {row} only"),
            _ => {
                let inner = self.slots().map_or(self.width, |slots| self.width / slots);
                format!("{} of {inner} rows", outputs.len())
            }
        };
        let [expert] = experts.iter().collect::<Vec<_>>()[..] else {
            return format!("{}, {} experts, {rows}", count(apart.len(), "token"), experts.len());
        };
        let routed = self.routed(*expert).len();
        let whose = match (apart.len(), routed) {
            (1, 1) => format!("the one token routed to expert {expert}"),
            (n, all) if n == all => format!("every token routed to expert {expert}"),
            (n, all) => format!("{n} of the {all} tokens routed to expert {expert}"),
        };
        let why = if outputs.len() == 1 { ", so one row of one expert's weights, scales or bias" } else { "" };
        let all = if apart.len() == routed && routed > 1 { format!(" ({routed} tokens)") } else { String::new() };
        format!("{whose}: {rows}{all}{why}")
    }

    fn plain(
        &self,
        outputs: &BTreeSet<usize>,
        heads: &BTreeSet<Option<(&'static str, usize)>>,
        apart: &BTreeSet<usize>,
        positions: &[usize],
    ) -> String {
        let whose = match (apart.iter().next(), positions.len()) {
            (Some(only), all) if apart.len() == 1 && all > 1 => format!("token {only} only"),
            (_, all) if all == apart.len() => format!("every token ({all})"),
            (Some(first), all) => {
                let from = positions.iter().filter(|p| *p >= first).count() == apart.len();
                let from = if from { format!(", all from token {first} on") } else { String::new() };
                format!("{} of {all} tokens{from}", apart.len())
            }
            (None, _) => return String::new(),
        };
        let rows = match (outputs.iter().next(), heads.iter().next()) {
            (Some(row), _) if outputs.len() == 1 => format!("column {row} only"),
            (_, Some(Some((kind, head)))) if heads.len() == 1 => {
                format!("{kind} head {head} only ({} columns)", outputs.len())
            }
            _ => format!("{} of {} columns", outputs.len(), self.width),
        };
        format!("{whose}: {rows}{}", self.suspect(apart))
    }

    /// In sums over experts: the expert whose tokens are exactly those that are apart.
    fn suspect(&self, apart: &BTreeSet<usize>) -> String {
        let Some(routes) = self.routes.filter(|routes| self.stage == "mlp.out" && apart.len() < routes.len()) else {
            return String::new();
        };
        let all: BTreeSet<i32> = routes.values().flatten().copied().collect();
        let exactly: Vec<i32> = all.into_iter().filter(|expert| self.routed(*expert) == *apart).collect();
        match exactly[..] {
            [expert] => format!("; exactly the tokens that are routed to expert {expert}"),
            _ => String::new(),
        }
    }
}

/// `1 token`, `2 tokens`.
pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Routes {
        BTreeMap::from([(0, vec![3, 1]), (1, vec![2, 0]), (2, vec![1, 3])])
    }

    fn spread(anatomy: &Anatomy, elements: &[(usize, usize)]) -> Spread {
        anatomy.spread(&[0, 1, 2], |see| elements.iter().for_each(|(row, column)| see(*row, *column)))
    }

    #[test]
    fn one_wrong_weight_row_is_recognised() {
        let routes = routes();
        let anatomy = Anatomy { stage: "mlp.up", width: 20, config: None, routes: Some(&routes) };
        let found = spread(&anatomy, &[(0, 7), (2, 17)]);
        assert_eq!((&found.experts[..], &found.outputs[..], &found.positions[..]), (&[3][..], &[7][..], &[0, 2][..]));
        assert!(found.what.starts_with("every token routed to expert 3: row 7 only (2 tokens), so"), "{}", found.what);
        let part = anatomy.part(2, 17);
        assert_eq!(anatomy.words(&part), "expert 3 (slot 1), row 7 (gate row 14, up row 15)");
        let some = spread(&anatomy, &[(2, 17)]).what;
        assert!(some.starts_with("1 of the 2 tokens routed to expert 3: row 7 only"), "{some}");
        let wide = spread(&anatomy, &[(0, 7), (1, 8)]).what;
        assert_eq!(wide, "2 tokens, 2 experts, 2 of 10 rows");
    }

    #[test]
    fn a_sum_over_experts_still_tells_the_expert() {
        let routes = BTreeMap::from([(0, vec![3, 1]), (1, vec![2, 1]), (2, vec![0, 3])]);
        let anatomy = Anatomy { stage: "mlp.out", width: 9, config: None, routes: Some(&routes) };
        let what = spread(&anatomy, &[(0, 5), (1, 5)]).what;
        assert_eq!(what, "2 of 3 tokens: column 5 only; exactly the tokens that are routed to expert 1");
        let what = spread(&anatomy, &[(1, 5), (2, 6)]).what;
        assert_eq!(what, "2 of 3 tokens, all from token 1 on: 2 of 9 columns");
        assert_eq!(
            spread(&anatomy, &[(1, 5)]).what,
            "token 1 only: column 5 only; exactly the tokens that are routed to expert 2"
        );
    }
}
