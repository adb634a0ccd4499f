//! Who drafts for a run: the flags, the draft's engine, and what the closing line says of it.

use super::Usage;
use super::engine::EngineArgs;
use fourfold::speculate::{DraftModel, Drafts, PromptLookup};
use fourfold::{Engine, Speculation};
use std::path::PathBuf;

/// Who drafts. Nobody unless asked for: whether it pays depends on model, device and text, and a draft takes memory.
#[derive(clap::Args)]
#[command(next_help_heading = "Drafting tokens")]
pub(super) struct Drafting {
    /// Let the model verify several drafted tokens in one step; the text stays the same, only the time differs. Drafts come from a smaller model in DIR with the same tokens, or (ngram) from what followed where the text went the same way before; auto: the built-in model's draft, ngram for other models
    #[arg(long, value_name = "DIR|ngram|auto|off", default_value = "off", value_parser = Who::read)]
    draft: Who,
    /// Tokens drafted for every step, 1 to 15 [default: as many as make it fastest, none while drafting loses]
    #[arg(long, value_name = "N")]
    draft_tokens: Option<usize>,
}

#[derive(Clone, PartialEq, Eq)]
enum Who {
    Off,
    Auto,
    Ngram,
    Dir(PathBuf),
}

impl Who {
    fn read(text: &str) -> Result<Self, &'static str> {
        Ok(match text {
            "" => return Err("it names no directory"),
            "off" => Self::Off,
            "auto" => Self::Auto,
            "ngram" => Self::Ngram,
            dir => Self::Dir(dir.into()),
        })
    }
}

/// Who drafts, once it is loaded.
pub(super) enum Draft {
    Nobody,
    Lookup,
    Model(Engine),
}

impl Drafting {
    /// The flags make sense.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.draft == Who::Off && self.draft_tokens.is_some() {
            return Err(Usage("--draft-tokens takes a draft: add --draft auto, or name one".to_owned()).into());
        }
        Ok(self.counted(Speculation::new(PromptLookup)).map(drop)?)
    }

    /// Load what drafts for `engine`. With `auto` there is always an answer.
    pub(super) fn load(&self, args: &EngineArgs, engine: &Engine, quiet: bool) -> anyhow::Result<Draft> {
        Ok(match &self.draft {
            Who::Off => Draft::Nobody,
            Who::Auto if args.shares_scales() => Draft::Nobody,
            Who::Auto if !args.has_model() => Draft::Model(args.load_draft(engine, None, quiet)?),
            Who::Auto | Who::Ngram => Draft::Lookup,
            Who::Dir(dir) => Draft::Model(args.load_draft(engine, Some(dir), quiet)?),
        })
    }

    fn counted(&self, speculation: Speculation) -> fourfold::Result<Speculation> {
        match self.draft_tokens {
            Some(count) => speculation.with_count(count),
            None => Ok(speculation),
        }
    }
}

impl Draft {
    /// For one conversation of `engine`.
    pub(super) fn speculation(&self, flags: &Drafting, engine: &Engine) -> fourfold::Result<Option<Speculation>> {
        let speculation = match self {
            Self::Nobody => return Ok(None),
            Self::Lookup => Speculation::new(PromptLookup),
            Self::Model(draft) => Speculation::new(DraftModel::new(draft, engine)?),
        };
        flags.counted(speculation).map(Some)
    }

    /// What became of drafted tokens, if anybody drafts.
    pub(super) fn told(&self, drafts: &Drafts) -> Option<String> {
        (!matches!(self, Self::Nobody)).then(|| told(drafts))
    }
}

/// By the definitions of [`Drafts`].
fn told(drafts: &Drafts) -> String {
    if drafts.steps == 0 {
        return "nothing drafted".to_owned();
    }
    let places: Vec<String> = drafts.rates().iter().map(|rate| format!("{:.0}", 100.0 * rate)).collect();
    format!(
        "{} drafted, {} accepted ({} % by place), {:.2} tokens a step in {} step{}",
        drafts.drafted(),
        drafts.accepted(),
        places.join(" "),
        drafts.tokens_per_step(),
        drafts.steps,
        if drafts.steps == 1 { "" } else { "s" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_are_told_with_their_counts() {
        let mut drafts = Drafts { steps: 12, ..Drafts::default() };
        (drafts.drafted[0], drafts.drafted[1], drafts.accepted[0], drafts.accepted[1]) = (12, 8, 9, 2);
        assert_eq!(told(&drafts), "20 drafted, 11 accepted (75 25 % by place), 1.92 tokens a step in 12 steps");
        assert_eq!(told(&Drafts::default()), "nothing drafted");
    }
}
