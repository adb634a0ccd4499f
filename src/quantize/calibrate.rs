//! Calibration: what the largest activations are, seen while a model runs over a text.

use std::collections::BTreeMap;

use super::Progress;
use crate::engine::{Engine, Want, Watch};
use crate::error::{Error, Result};
use crate::ops::STATS_WORDS;
use crate::program::Stage;
use crate::tokenizer::TokenId;
use crate::trace::file::split_layer;

/// The stages of a layer that linears take in.
const INPUTS: [&str; 4] = ["attn_norm", "attention", "mlp_norm", "mlp.up"];

/// The largest magnitudes of what linears take in, over a text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibration {
    /// By stage, such as `layers.0.attn_norm`.
    pub amax: BTreeMap<String, f32>,
}

/// Runs an engine over `tokens` in windows of at most `window`, each from an empty cache and after `lead` if there is one
/// ([`Engine::leading_token`]), and takes the largest magnitudes.
pub fn calibrate(
    engine: &Engine,
    tokens: &[TokenId],
    lead: Option<TokenId>,
    window: usize,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Calibration> {
    let own = window.saturating_sub(lead.iter().len());
    if own == 0 {
        return Err(Error::option("calibrate", format!("windows of {window} tokens hold no text")));
    }
    if tokens.is_empty() {
        return Err(Error::option("calibrate", "the text has no tokens"));
    }
    let mut calibration = Calibration::default();
    let mut session = engine.session()?;
    let keep = |name: &str| split_layer(name).is_some_and(|(_, stage)| INPUTS.contains(&stage));
    let mut see = |stage: &Stage, words: Vec<u32>| {
        for row in words.chunks_exact(STATS_WORDS) {
            // Minimum and maximum of the finite values; how many were NaN or infinite.
            let (least, most) = (f32::from_bits(row[2]), f32::from_bits(row[3]));
            if row[4] + row[5] > 0 {
                let reason = format!("{} holds NaN or infinity: the model does not compute rightly here", stage.name);
                return Err(Error::option("calibrate", reason));
            }
            let amax = calibration.amax.entry(stage.name.clone()).or_default();
            *amax = amax.max(least.abs()).max(most.abs());
        }
        Ok(())
    };
    let mut done = 0;
    for piece in tokens.chunks(own) {
        let all: Vec<TokenId> = lead.into_iter().chain(piece.iter().copied()).collect();
        session.clear();
        session.feed_watching(&all, Want::Nothing, &mut Watch { keep: &keep, stats: true, see: &mut see })?;
        done += piece.len() as u64;
        progress(&Progress { what: "calibration", done, total: tokens.len() as u64 });
    }
    Ok(calibration)
}
