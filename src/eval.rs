//! How well a model predicts a text: perplexity, bits per byte, accuracy; and how far it is from a reference model or a
//! recorded trace (Kullback-Leibler divergence, agreement).
//!
//! The text's tokens are cut into windows, each computed from an empty cache. A window begins with the token that the
//! tokenizer puts before every text, if it does ([`Engine::leading_token`]); the first token of a window without one has nothing
//! to be predicted from and is not scored. With a stride below the window's length the windows overlap, and each token is
//! scored once, in the first window that has it. Logits come from the engine in f32; everything after is f64.

use std::time::{Duration, Instant};

use crate::engine::{Engine, Session, Want};
use crate::error::{Error, Result};
use crate::tokenizer::TokenId;
use crate::trace::file::{TraceFile, Values};

/// Tokens of a window unless asked otherwise (or fewer, if the context is shorter).
pub const DEFAULT_WINDOW: usize = 512;

/// How a text is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Tokens of a window, the leading one included; [`DEFAULT_WINDOW`] or the context if `None`.
    pub window: Option<usize>,
    /// Tokens from the start of a window to that of the next; a whole window's if `None`.
    pub stride: Option<usize>,
    /// Only so many tokens of the text.
    pub max_tokens: Option<usize>,
    /// What each window begins with.
    pub lead: Option<TokenId>,
}

/// What the model is held against.
#[derive(Clone, Copy, Default)]
pub enum Against<'a> {
    /// Only the text.
    #[default]
    Nothing,
    /// A second engine over the same tokens.
    Engine(&'a Engine),
    /// A trace with the logits of every token of one window, which is the whole run.
    Trace(&'a TraceFile),
}

/// How far the work has come, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Computed so far.
    pub done: u64,
    /// To be computed in all.
    pub total: u64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Tokens that were computed, leading ones and overlaps included.
    pub computed: usize,
    /// Windows.
    pub windows: usize,
    /// Tokens that were predicted and scored.
    pub scored: usize,
    /// Bytes of text that the scored tokens stand for.
    pub bytes: usize,
    /// Of the model.
    pub model: Score,
    /// Of the reference, and how far the model is from it.
    pub reference: Option<Comparison>,
}

/// How well the tokens were predicted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Mean negative log-likelihood of a token, in nats.
    pub nll: f64,
    /// Fraction of tokens that were the likeliest ones.
    pub accuracy: f64,
    /// Time spent computing logits; none for a trace.
    pub time: Duration,
}

impl Score {
    /// e to the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.nll.exp()
    }
}

/// A model against its reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Of the reference itself.
    pub score: Score,
    /// Mean of KL(reference || model) over the scored places, in nats.
    pub kl_mean: f64,
    /// The value that 99 of 100 places do not exceed.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// Fraction of places where both find the same token likeliest.
    pub agreement: f64,
}

impl Report {
    /// Bits that the model needs for a byte of the scored text.
    pub fn bits_per_byte(&self, score: &Score) -> f64 {
        score.nll * self.scored as f64 / std::f64::consts::LN_2 / self.bytes as f64
    }

    /// Tokens computed in a second; 0 where nothing was.
    pub fn tokens_per_second(&self, score: &Score) -> f64 {
        let seconds = score.time.as_secs_f64();
        if seconds > 0.0 { self.computed as f64 / seconds } else { 0.0 }
    }
}

/// The natural logarithms of the probabilities that logits stand for, in f64.
///
/// # Errors
/// If a logit is NaN or infinite.
pub fn log_softmax(logits: &[f32]) -> Result<Vec<f64>> {
    if let Some(at) = logits.iter().position(|v| !v.is_finite()) {
        let reason = format!("the logit of token {at} is {}: the model does not compute rightly here", logits[at]);
        return Err(Error::Device(reason));
    }
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|v| (f64::from(*v) - largest).exp()).sum();
    // The largest is taken off by itself: added to the other term first, it could swallow it.
    let norm = sum.ln();
    Ok(logits.iter().map(|v| f64::from(*v) - largest - norm).collect())
}

/// KL(p || q) of two distributions given as logarithms, in nats. Exactly 0 where they are equal.
pub fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

/// Runs `engine` over `text` and scores it; `against` gives a reference.
///
/// # Errors
/// A text too short to score, a window that does not fit the context, a reference with another vocabulary or other tokens.
pub fn evaluate(
    engine: &Engine,
    text: &str,
    against: Against,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    let tokenizer = engine.tokenizer()?;
    let mut tokens = tokenizer.encode_with_specials(text)?;
    if let Against::Engine(reference) = against {
        check_reference(engine, reference, text, &tokens)?;
    }
    tokens.truncate(options.max_tokens.unwrap_or(usize::MAX));
    let windows = match against {
        Against::Trace(trace) => vec![trace_window(trace, &tokens, options)?],
        _ => windows(engine, &tokens, options)?,
    };
    if windows.iter().all(|w| w.first_scored >= w.tokens.len()) {
        let reason = format!("has {} tokens, of which none follows another: there is nothing to predict", tokens.len());
        return Err(Error::Text { what: "the text".into(), reason });
    }
    let mut model = Runner::engine(engine)?;
    let mut reference = match against {
        Against::Nothing => None,
        Against::Engine(other) => Some(Runner::engine(other)?),
        Against::Trace(trace) => Some(Runner::trace(trace, &windows[0], engine.config().vocab_size)?),
    };
    let total = windows.iter().map(|w| w.tokens.len() as u64).sum();
    let (mut tally, mut done) = (Tally::default(), 0);
    for window in &windows {
        model.restart();
        reference.iter_mut().for_each(Runner::restart);
        let mut at = 0;
        for piece in window.tokens.chunks(model.chunk()) {
            let logits = model.logits(piece)?;
            let theirs = reference.as_mut().map(|r| r.logits(piece)).transpose()?;
            let vocab = logits.len() / piece.len();
            for (i, row) in logits.chunks_exact(vocab).enumerate() {
                // The row at a position predicts the token after it.
                let next = at + i + 1;
                if next < window.first_scored || next >= window.tokens.len() {
                    continue;
                }
                let theirs = theirs.as_ref().map(|all| &all[i * vocab..][..vocab]);
                let target = window.tokens[next];
                tally.add(row, theirs, target)?;
                tally.bytes += tokenizer.token_bytes(target).len();
            }
            at += piece.len();
            done += piece.len() as u64;
            progress(Progress { done, total });
        }
    }
    Ok(tally.report(windows.len(), total as usize, model.time(), reference.map(|r| r.time())))
}

/// Tokens that are computed together, and the first that is scored.
struct Window {
    tokens: Vec<TokenId>,
    first_scored: usize,
}

fn windows(engine: &Engine, tokens: &[TokenId], options: &Options) -> Result<Vec<Window>> {
    let context = engine.context();
    let window = options.window.unwrap_or(DEFAULT_WINDOW.min(context));
    let lead = options.lead.iter().len();
    if context < 2 {
        return Err(Error::option("context", "is too short to score anything in: give at least 2"));
    }
    if window < 2 || window > context {
        return Err(Error::option("window", format!("{window} is not from 2 to {context}, the context")));
    }
    let own = window - lead;
    let stride = options.stride.unwrap_or(own);
    if stride == 0 || stride > own {
        return Err(Error::option("stride", format!("{stride} is not from 1 to {own}, a window's own tokens")));
    }
    let (mut windows, mut scored) = (Vec::new(), 0);
    for from in (0..tokens.len()).step_by(stride) {
        let to = (from + own).min(tokens.len());
        let all: Vec<TokenId> = options.lead.into_iter().chain(tokens[from..to].iter().copied()).collect();
        // Nothing predicts the first token.
        let first_scored = (lead + scored.max(from) - from).max(1);
        if first_scored < all.len() {
            windows.push(Window { tokens: all, first_scored });
        }
        scored = to;
        if to == tokens.len() {
            break;
        }
    }
    Ok(windows)
}

/// The tokens of a trace, which must be the text's first.
fn trace_window(trace: &TraceFile, tokens: &[TokenId], options: &Options) -> Result<Window> {
    let fault = |reason: String| Error::file(trace.path().display().to_string(), reason);
    if options.window.is_some() || options.stride.is_some() {
        let reason = "does not go with a reference trace: its run is the one window";
        return Err(Error::option(if options.window.is_some() { "window" } else { "stride" }, reason));
    }
    let theirs = trace.tokens().ok_or_else(|| fault("does not say which tokens it is a run of".into()))?;
    let with_lead = options.lead.filter(|lead| theirs.first() == Some(lead) && tokens.first() != Some(lead));
    let ours: Vec<TokenId> = with_lead.into_iter().chain(tokens.iter().copied()).take(theirs.len()).collect();
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    if same < theirs.len() {
        let word = |list: &[TokenId]| list.get(same).map_or("the end".into(), |id| id.to_string());
        let reason = format!("is a run of other tokens: at {same} it has {}, the text {}", word(theirs), word(&ours));
        return Err(fault(reason));
    }
    Ok(Window { tokens: ours, first_scored: 1 })
}

/// A reference has to have the same vocabulary, and where it has a tokenizer, one that cuts the text alike.
fn check_reference(engine: &Engine, reference: &Engine, text: &str, tokens: &[TokenId]) -> Result<()> {
    let fault = |reason: String| Err(Error::option("reference", reason));
    let (ours, theirs) = (engine.config().vocab_size, reference.config().vocab_size);
    if ours != theirs {
        return fault(format!("{} has {theirs} tokens, {} has {ours}", reference.name(), engine.name()));
    }
    if let Ok(tokenizer) = reference.tokenizer()
        && tokenizer.encode_with_specials(text)? != tokens
    {
        return fault(format!(
            "the tokenizers of {} and {} cut the text in other ways",
            reference.name(),
            engine.name()
        ));
    }
    Ok(())
}

/// Where logits come from.
enum Runner {
    Engine { session: Box<Session>, time: Duration },
    Trace { logits: Vec<f32>, vocab: usize, at: usize },
}

impl Runner {
    fn engine(engine: &Engine) -> Result<Self> {
        Ok(Self::Engine { session: Box::new(engine.session()?), time: Duration::ZERO })
    }

    fn trace(trace: &TraceFile, window: &Window, vocab: usize) -> Result<Self> {
        let fault = |reason: String| Error::file(trace.path().display().to_string(), reason);
        if !trace.has_values("logits") {
            return Err(fault("holds no logits: record it without --stats and with --stage logits".into()));
        }
        let stage = trace.tensor("logits")?;
        let rows = window.tokens.len();
        if (stage.rows, stage.width) != (rows, vocab) {
            let reason = format!(
                "holds logits [{}, {}]; this text and model need [{rows}, {vocab}]: record every position",
                stage.rows, stage.width
            );
            return Err(fault(reason));
        }
        if trace.positions("logits", rows)?.0.iter().enumerate().any(|(i, p)| i != *p) {
            return Err(fault("holds logits of other positions than the first ones".into()));
        }
        let Values::F32(logits) = stage.values else {
            return Err(fault("holds logits that are no floats".into()));
        };
        Ok(Self::Trace { logits, vocab, at: 0 })
    }

    fn restart(&mut self) {
        match self {
            Self::Engine { session, .. } => session.clear(),
            Self::Trace { at, .. } => *at = 0,
        }
    }

    fn chunk(&self) -> usize {
        match self {
            Self::Engine { session, .. } => session.chunk(),
            Self::Trace { .. } => usize::MAX,
        }
    }

    /// The logits of the next tokens, `[tokens, V]`.
    fn logits(&mut self, tokens: &[TokenId]) -> Result<Vec<f32>> {
        match self {
            Self::Engine { session, time } => {
                let started = Instant::now();
                let logits = session.feed(tokens, Want::All);
                *time += started.elapsed();
                logits
            }
            Self::Trace { logits, vocab, at, .. } => {
                let from = *at * *vocab;
                *at += tokens.len();
                Ok(logits[from..*at * *vocab].to_vec())
            }
        }
    }

    fn time(&self) -> Duration {
        match self {
            Self::Engine { time, .. } => *time,
            Self::Trace { .. } => Duration::ZERO,
        }
    }
}

/// Sums over scored tokens.
#[derive(Default)]
struct Tally {
    scored: usize,
    bytes: usize,
    nll: [f64; 2],
    right: [usize; 2],
    divergences: Vec<f64>,
    agreed: usize,
}

impl Tally {
    fn add(&mut self, logits: &[f32], reference: Option<&[f32]>, target: TokenId) -> Result<()> {
        self.scored += 1;
        let ours = self.score(0, logits, target)?;
        let Some(reference) = reference else { return Ok(()) };
        let theirs = self.score(1, reference, target)?;
        self.divergences.push(divergence(&theirs.0, &ours.0));
        self.agreed += usize::from(ours.1 == theirs.1);
        Ok(())
    }

    /// Scores a row for the model (0) or its reference (1). Gives its log-probabilities and the likeliest token.
    fn score(&mut self, which: usize, logits: &[f32], target: TokenId) -> Result<(Vec<f64>, usize)> {
        let log = log_softmax(logits)?;
        let best = likeliest(logits);
        self.nll[which] -= log[target as usize];
        self.right[which] += usize::from(best == target as usize);
        Ok((log, best))
    }

    fn report(mut self, windows: usize, computed: usize, time: Duration, theirs: Option<Duration>) -> Report {
        let n = self.scored as f64;
        let score =
            |which: usize, time| Score { nll: self.nll[which] / n, accuracy: self.right[which] as f64 / n, time };
        let (model, theirs) = (score(0, time), theirs.map(|time| score(1, time)));
        let kl_mean = self.divergences.iter().sum::<f64>() / n;
        self.divergences.sort_by(f64::total_cmp);
        let at = |i: usize| self.divergences.get(i).copied().unwrap_or_default();
        let reference = theirs.map(|score| Comparison {
            score,
            kl_mean,
            kl_p99: at((self.scored * 99).div_ceil(100) - 1),
            kl_max: at(self.scored - 1),
            agreement: self.agreed as f64 / n,
        });
        Report { computed, windows, scored: self.scored, bytes: self.bytes, model, reference }
    }
}

/// The token with the largest logit, the first of several.
fn likeliest(logits: &[f32]) -> usize {
    let larger = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).fold(0, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_are_equal_chances() {
        for v in [0.0, -3.5, 1e30] {
            let log = log_softmax(&[v; 1000]).unwrap();
            assert!(log.iter().all(|p| (p + 1000f64.ln()).abs() < 1e-12));
        }
        let log = log_softmax(&[1e4, 0.0, -1e4]).unwrap();
        assert_eq!((log[0], log[2]), (0.0, -2e4));
        assert_eq!(divergence(&log, &log), 0.0);
        assert!(log_softmax(&[0.0, f32::NAN]).unwrap_err().to_string().contains("token 1"));
        let (p, q) = (log_softmax(&[0.0, 0.0]).unwrap(), log_softmax(&[3f32.ln(), 0.0]).unwrap());
        let want = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((divergence(&p, &q) - want).abs() < 1e-7);
    }
}
