//! How many tokens to draft: the number that gives most tokens a second by what steps have cost and how often proposals
//! were right; none while drafting loses. It follows time, and changes only how many rows are verified, never a bit.

use super::MOST;

/// Tokens drawn without drafts before the first proposals, so that there is something to compare with, and again after
/// drafting was found to lose; then twice as many each time, up to [`LONGEST_REST`].
const FIRST_REST: usize = 4;
const SHORTEST_REST: usize = 16;
const LONGEST_REST: usize = 256;
/// Steps with proposals before drafting may be found to lose.
const PROBES: usize = 3;
/// What is left of an observation after a step: about the last ten count.
const KEPT: f64 = 0.9;
/// How often a proposal is taken to be right before anything is known of it.
const PRIOR: f64 = 0.7;

/// How often something was so, lately.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    hits: f64,
    of: f64,
}

impl Rate {
    fn saw(&mut self, hit: bool) {
        self.hits += f64::from(u8::from(hit));
        self.of += 1.0;
    }

    fn fade(&mut self) {
        self.hits *= KEPT;
        self.of *= KEPT;
    }

    /// What is expected, where `prior` counts as one observation.
    fn expect(&self, prior: f64) -> f64 {
        (self.hits + prior) / (self.of + 1.0)
    }
}

/// Seconds that something takes, lately.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    seen: usize,
    seconds: f64,
}

impl Cost {
    fn saw(&mut self, seconds: f64) {
        self.seen += 1;
        // The first time compiles kernels, or computes a draft's prompt. After it, what makes it slower is mostly
        // somebody else: it counts less than what makes it faster.
        self.seconds = match self.seen {
            1 | 2 => seconds,
            _ if seconds < self.seconds => seconds,
            _ => self.seconds + (seconds - self.seconds) / 8.0,
        };
    }

    fn known(&self) -> Option<f64> {
        (self.seen > 1).then_some(self.seconds)
    }
}

/// What the number of drafted tokens is chosen from. Times are in seconds.
#[derive(Clone, Debug)]
pub(super) struct Odds {
    /// A token without drafts.
    pub(super) plain: f64,
    /// A step over so many rows, from one on.
    pub(super) steps: Vec<f64>,
    /// Drafting a token.
    pub(super) draft: f64,
    /// How often the drafter proposes anything when asked.
    pub(super) offered: f64,
    /// How often the proposal in each place is right where those before it were.
    pub(super) right: Vec<f64>,
}

impl Odds {
    /// Tokens a second, if up to `count` tokens are drafted for each step.
    fn speed(&self, count: usize) -> f64 {
        if count == 0 {
            return 1.0 / self.plain;
        }
        let all_right = self.right[..count].iter().scan(1.0, |all, right| {
            *all *= right;
            Some(*all)
        });
        let (tokens, time) = (1.0 + all_right.sum::<f64>(), self.steps[count] + count as f64 * self.draft);
        // Asked in vain, the step is over one row.
        let (o, vain) = (self.offered, 1.0 - self.offered);
        (o * tokens + vain) / (o * time + vain * self.steps[0])
    }

    /// The fastest number of drafted tokens among `least..=most`; of equally fast ones the smallest.
    pub(super) fn best(&self, least: usize, most: usize) -> usize {
        let most = most.min(self.steps.len() - 1).min(self.right.len());
        (least..=most).fold(least.min(most), |best, n| if self.speed(n) > self.speed(best) { n } else { best })
    }
}

/// Chooses the number of drafted tokens, step by step.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    /// Seconds of a token without drafts, lately.
    plain: Option<f64>,
    /// Tokens drawn in this rest, and the seconds of all but the first, which a device that runs ahead begins with.
    rested: (usize, f64),
    /// By rows, from one on.
    steps: [Cost; MOST + 1],
    draft: Cost,
    offered: Rate,
    right: [Rate; MOST],
    /// Tokens to draw without drafts before the next proposals.
    rest: usize,
    next_rest: usize,
    /// Steps with proposals that are still to be made, whatever they cost.
    probes: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            plain: None,
            rested: (0, 0.0),
            steps: [Cost::default(); MOST + 1],
            draft: Cost::default(),
            offered: Rate::default(),
            right: [Rate::default(); MOST],
            rest: FIRST_REST,
            next_rest: SHORTEST_REST,
            probes: PROBES,
        }
    }
}

impl Pace {
    /// Tokens to draw without drafts before [`Self::count`] is asked.
    pub(super) fn rest(&self) -> usize {
        self.rest
    }

    /// How many tokens to draft for the next step, at most `most`. 0: first draw [`Self::rest`] without.
    pub(super) fn count(&mut self, most: usize) -> usize {
        let odds = self.odds();
        // Longer drafts than this are tried when the cost of those of half the length is known.
        let tried = (1..=MOST).rev().find(|n| self.steps[*n].known().is_some()).unwrap_or(1);
        let most = most.min(2 * tried + 1);
        if most == 0 {
            return 0;
        }
        if self.probes > 0 {
            self.probes -= 1;
            return odds.best(1, most);
        }
        let best = odds.best(0, most);
        if best > 0 {
            self.next_rest = SHORTEST_REST;
        } else {
            self.rest = self.next_rest;
            self.next_rest = (2 * self.rest).min(LONGEST_REST);
            self.probes = PROBES;
        }
        best
    }

    /// A token was drawn without drafts.
    pub(super) fn rested(&mut self, seconds: f64) {
        let (count, sum) = self.rested;
        self.rested = (count + 1, if count == 0 { 0.0 } else { sum + seconds });
        self.rest = self.rest.saturating_sub(1);
        if self.rest == 0 && count > 0 {
            // Single tokens tell little: where a device runs ahead, one may be there already and the next take long.
            let mean = self.rested.1 / count as f64;
            self.plain = Some(self.plain.map_or(mean, |plain| (plain + mean) / 2.0));
            self.rested = (0, 0.0);
        }
    }

    /// A step over `rows` rows was made.
    pub(super) fn stepped(&mut self, rows: usize, seconds: f64) {
        self.steps[rows - 1].saw(seconds);
        if rows > 1 {
            // In all places, so that one bad proposal far back, where few come, is not remembered for ever.
            self.right.iter_mut().for_each(Rate::fade);
        }
    }

    /// The drafter was asked, and gave `count` tokens.
    pub(super) fn drafted(&mut self, count: usize, seconds: f64) {
        self.offered.fade();
        self.offered.saw(count > 0);
        if count > 0 {
            self.draft.saw(seconds / count as f64);
        }
    }

    /// The proposal in a place, from 0 on, was right or was the first wrong one.
    pub(super) fn judged(&mut self, place: usize, right: bool) {
        self.right[place].saw(right);
    }

    fn odds(&self) -> Odds {
        let plain = self.plain.or(self.steps[0].known()).unwrap_or(1.0);
        let known: Vec<(usize, f64)> = [(0, self.steps[0].known().unwrap_or(plain))]
            .into_iter()
            .chain((1..=MOST).filter_map(|i| Some((i, self.steps[i].known()?))))
            .collect();
        // Between two known numbers of rows along the line through them; beyond the last, along that from the first.
        let cost = |i: usize| {
            let after = known.partition_point(|(at, _)| *at < i);
            let ((start, low), (end, high)) = match known.get(after) {
                Some(point) => (known[after.saturating_sub(1)], *point),
                None => (known[0], known[after - 1]),
            };
            if start == end { high } else { low + (high - low) * (i - start) as f64 / (end - start) as f64 }
        };
        let mut prior = PRIOR;
        let right = self.right.iter().map(|rate| {
            prior = rate.expect(prior);
            prior
        });
        Odds {
            plain,
            right: right.collect(),
            steps: (0..=MOST).map(cost).collect(),
            draft: self.draft.known().unwrap_or(0.0),
            offered: self.offered.expect(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn odds(right: f64, row: f64, draft: f64) -> Odds {
        let steps = (0..=MOST).map(|more| 1.0 + row * more as f64).collect();
        Odds { plain: 1.0, steps, draft, offered: 1.0, right: vec![right; MOST] }
    }

    #[test]
    fn the_number_follows_costs_and_acceptance() {
        // Rows and drafts for nothing: as many as there may be, unless none is ever right.
        assert_eq!(odds(0.9, 0.0, 0.0).best(0, MOST), MOST);
        assert_eq!(odds(0.9, 0.0, 0.0).best(0, 4), 4);
        assert_eq!(odds(0.0, 0.0, 0.0).best(0, MOST), 0);
        // A row costs as much as a step: never.
        assert_eq!(odds(0.99, 1.0, 0.0).best(0, MOST), 0);
        assert_eq!(odds(0.99, 1.0, 0.0).best(1, MOST), 1, "a probe is as short as it can be");
        // By hand, right half of the time, a tenth for a row: (1 + 1/2) / 1.1 = 1.364, 1.75 / 1.2 = 1.458,
        // 1.875 / 1.3 = 1.442.
        assert_eq!(odds(0.5, 0.1, 0.0).best(0, MOST), 2);
        // The same with drafts that cost three tenths: 1.5 / 1.4 = 1.071, 1.75 / 1.8 = 0.972.
        assert_eq!(odds(0.5, 0.1, 0.3).best(0, MOST), 1);
        assert_eq!(odds(0.5, 0.1, 0.5).best(0, MOST), 0);
        // The better they are, the more of them.
        let counts: Vec<usize> = (0..10).map(|tenths| odds(0.1 * f64::from(tenths), 0.1, 0.0).best(0, MOST)).collect();
        assert!(counts.is_sorted() && counts[0] == 0 && counts[9] > 5, "{counts:?}");
    }

    #[test]
    fn asking_in_vain_costs_what_running_ahead_would_have_gained() {
        let rarely = Odds { offered: 0.02, ..odds(0.9, 0.1, 0.0) };
        assert!(rarely.best(0, MOST) > 0, "where a step alone is no slower, asking costs nothing");
        let ahead = Odds { plain: 0.8, ..rarely };
        assert_eq!(ahead.best(0, MOST), 0);
        assert!(Odds { offered: 1.0, ..ahead }.best(0, MOST) > 0);
    }

    /// Draw `tokens` tokens with proposals of which `right` in ten are right. Gives tokens drawn without asking, steps,
    /// tokens drafted, and the time.
    fn simulate(pace: &mut Pace, tokens: usize, right: usize, row: f64, draft: f64) -> (usize, usize, usize, f64) {
        let (mut rested, mut steps, mut drafted, mut time) = (0, 0, 0, 0.0);
        let (mut drawn, mut turn) = (0, 0);
        while drawn < tokens {
            let count = if pace.rest() > 0 { 0 } else { pace.count(MOST) };
            if count == 0 {
                pace.rested(1.0);
                (drawn, rested, time) = (drawn + 1, rested + 1, time + 1.0);
                continue;
            }
            pace.drafted(count, draft * count as f64);
            let took = 1.0 + row * count as f64;
            pace.stepped(count + 1, took);
            (steps, drafted, time, drawn) = (steps + 1, drafted + count, time + took + draft * count as f64, drawn + 1);
            for place in 0..count {
                turn = (turn + 7) % 10;
                pace.judged(place, turn < right);
                if turn >= right {
                    break;
                }
                drawn += 1;
            }
        }
        (rested, steps, drafted, time)
    }

    #[test]
    fn it_is_off_while_it_loses_and_comes_back() {
        let mut pace = Pace::default();
        let (rested, steps, ..) = simulate(&mut pace, 2000, 0, 0.1, 0.1);
        assert!(steps > 6 && steps < 60 && rested > 1900, "{rested} without, {steps} with proposals");
        // Now they are right: it finds out.
        let (rested, steps, drafted, time) = simulate(&mut pace, 2000, 9, 0.1, 0.1);
        assert!(rested < 400 && drafted > 3 * steps && time < 1300.0, "{rested}, {steps}, {drafted}, {time}");
        // And wrong again.
        let (rested, ..) = simulate(&mut pace, 2000, 0, 0.1, 0.1);
        assert!(rested > 1850, "{rested}");
        // Rows that cost as much as steps do not pay however right they are.
        let (rested, _, _, time) = simulate(&mut Pace::default(), 2000, 9, 1.0, 0.1);
        assert!(rested > 1600 && time < 2200.0, "{rested}, {time}");
    }

    #[test]
    fn one_slow_step_does_not_decide() {
        // The first of each size compiles kernels.
        let mut cost = Cost::default();
        cost.saw(100.0);
        assert_eq!(cost.known(), None);
        [1.0, 1.0, 9.0].iter().for_each(|seconds| cost.saw(*seconds));
        assert_eq!(cost.known(), Some(2.0));
        cost.saw(1.0);
        assert_eq!(cost.known(), Some(1.0));
    }

    #[test]
    fn unknown_sizes_are_thought_to_lie_between_known_ones() {
        let mut pace = Pace::default();
        for (rows, seconds) in [(1, 1.0), (5, 3.0)] {
            pace.stepped(rows, seconds);
            pace.stepped(rows, seconds);
        }
        assert_eq!(pace.odds().steps[..7], [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]);
        assert!(pace.count(0) == 0 && pace.count(2) <= 2);
        assert_eq!(Pace::default().odds().steps, [1.0; MOST + 1]);
    }
}
