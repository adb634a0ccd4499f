//! From router scores to routes: which experts a token goes to, and with what weight.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::Kernel;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "router", source: include_str!("../../shaders/router.wgsl"), slots: &[] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// Experts.
    pub e: u32,
    /// Experts per token.
    pub a: u32,
    /// Whether the weights are a softmax over the chosen scores; else over all of them (`norm_topk_prob` false).
    pub normalise: bool,
}

/// Where tokens go: `experts [T, A]` u32 and `weights [T, A]` f32, largest first.
#[derive(Clone, Copy, Debug)]
pub struct Routes {
    /// Expert indices.
    pub experts: Slice,
    /// Softmax over the chosen scores, or over all.
    pub weights: Slice,
}

impl Program {
    /// The A largest of `scores [T, E]` f32, and their weights.
    pub fn router(&mut self, op: Router, scores: Slice, routes: Routes) {
        let launch = Launch::new(Op::Router(op), &KERNEL, [self.tokens, 1, 1])
            .constant("E", op.e)
            .constant("A", op.a)
            .constant("ALL", u32::from(!op.normalise))
            .read("scores", scores)
            .write("experts", routes.experts)
            .write("weights", routes.weights);
        self.push(launch);
    }
}

impl Router {
    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let scores = &views.f32("scores")[..tokens * self.e as usize];
        self.reference(scores, views.words_mut("experts"), views.f32_mut("weights"));
    }

    /// `scores [T, E]`, `experts`, `weights`: `[T, A]`. Among equal scores the lower index comes first.
    pub fn reference(&self, scores: &[f32], experts: &mut [u32], weights: &mut [f32]) {
        let (e, a) = (self.e as usize, self.a as usize);
        for (t, scores) in scores.chunks_exact(e).enumerate() {
            let mut order: Vec<usize> = (0..e).collect();
            order.sort_by(|i, j| (scores[*j] + 0.0).total_cmp(&(scores[*i] + 0.0)).then(i.cmp(j)));
            let top = f64::from(scores[order[0]]);
            let exp: Vec<f64> = order.iter().map(|i| (f64::from(scores[*i]) - top).exp()).collect();
            let total: f64 = exp[..if self.normalise { a } else { e }].iter().sum();
            for i in 0..a {
                experts[t * a + i] = order[i] as u32;
                weights[t * a + i] = (exp[i] / total) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_index() {
        let op = Router { e: 5, a: 3, normalise: true };
        let (mut experts, mut weights) = ([9; 3], [f32::NAN; 3]);
        op.reference(&[1.0, 2.0, -0.0, 2.0, 0.0], &mut experts, &mut weights);
        assert_eq!(experts, [1, 3, 0]);
        assert!(weights[0] == weights[1] && weights[1] > weights[2]);
    }
}
