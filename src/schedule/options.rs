//! What a scheduler is asked to be, and the sizes that follow.

use crate::config::LayerType;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::kv::Sizes;
use crate::model::{Paged, Plan};
use crate::ops::Activations;

/// Most sessions that run at once.
const MOST: usize = 1024;
/// Most tokens drafted for a step.
const MOST_DRAFTS: usize = 1024;
/// Most positions of a page.
const MOST_OF_A_PAGE: usize = 1024;

/// How to make a [`crate::Scheduler`]. None of it changes what a session says.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// Most sessions that run at once, 1 to 1024; others wait.
    pub sessions: usize,
    /// Most positions of a session; `None`: as many as the engine was built for.
    pub context: Option<usize>,
    /// Positions of a page of the cache, 1 to 1024.
    pub page: usize,
    /// Pages of the cache, for all sessions together; `None`: as many as all of them can take. Not more than the device can
    /// bind, where each key/value head of a layer may have a binding of its own. Sliding layers take fewer: a session keeps what
    /// their windows see.
    pub pages: Option<usize>,
    /// Most tokens of prompts in one step, 1 to 2048; `None`: as the engine was built.
    pub chunk: Option<usize>,
    /// Keep a prefix that sessions have in common once, and for those that come later.
    pub share: bool,
    /// Most drafted tokens in one step, 0 to 1024, of all sessions together: those that draft share them. Each takes room for
    /// its logits; there are never more than the device binds beside those of the sessions.
    pub drafts: usize,
}

impl Default for SchedulerOptions {
    fn default() -> Self {
        Self { sessions: 16, context: None, page: 16, pages: None, chunk: None, share: true, drafts: 16 }
    }
}

/// The sizes of everything, or why they cannot be.
pub(super) fn planned(engine: &Engine, options: &SchedulerOptions) -> Result<(Plan, Sizes)> {
    let range = |option, n: usize, most: usize, what: &str| match n == 0 || n > most {
        true => Err(Error::option(option, format!("{n} is out of range: {what} 1 to {most}"))),
        false => Ok(n),
    };
    let sequences = range("sessions", options.sessions, MOST, "a scheduler runs")?;
    let page = range("page", options.page, MOST_OF_A_PAGE, "a page has positions")?;
    if options.drafts > MOST_DRAFTS {
        let reason =
            format!("{} is out of range: a step has room for 0 to {MOST_DRAFTS} drafted tokens", options.drafts);
        return Err(Error::option("drafts", reason));
    }
    let most = engine.context();
    let context = range("context", options.context.unwrap_or(most), most, "the engine was built for")?;
    if engine.activations() == Activations::Nvfp4Dynamic {
        let reason = "\"nvfp4-dynamic\" has one scale for all rows of a step, so sessions would change each other: use \
                      \"nvfp4-token\"";
        return Err(Error::option("activations", reason));
    }
    let (config, device) = (engine.config(), engine.device());
    let chunk = options.chunk.unwrap_or(engine.plan().chunk as usize);
    let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let plan = Plan { context: context as u32, chunk: clamp(chunk), ..*engine.plan() };
    plan.check(config)?;
    let places = context.div_ceil(page);
    let sliding = config.layer_types.contains(&LayerType::Sliding) && config.sliding_window > 0;
    let mut sizes = Sizes {
        page,
        window: sliding.then_some(config.sliding_window),
        sequences,
        places,
        ahead: 1 + device.ahead(),
        // Of prompts, and drawn tokens that were given many at once or drafted.
        rows: chunk + (sequences + options.drafts).max(chunk.min(16)),
        pages: [0; 2],
        bound: false,
    };
    // Each key/value head may have a binding of its own.
    let most = engine.plan().cache.most(device.limits());
    let bound = (most / (config.head_dim * page) as u64).min(1 << 31) as usize;
    let asked = options.pages.unwrap_or(sequences * places);
    if asked == 0 {
        return Err(Error::option("pages", "0 hold nothing: give at least 1"));
    }
    let full = asked.min(bound);
    // Twice what all sessions keep of sliding layers: prefixes want theirs as well.
    let (most, spare) = (sizes.most(context.min(full * page))[1], sizes.spare()[1]);
    let pages = [full, ((2 * sequences * most).min(full) + spare).min(bound)];
    if full == 0 || pages[1] < most + spare {
        let reason = format!(
            "{} binds {bound} pages of a layer; a session and a step with {chunk} tokens of prompts take {}: choose a smaller \
             page or chunk",
            device.describe(),
            most + spare
        );
        return Err(Error::option("page", reason));
    }
    (sizes.pages, sizes.bound) = (pages, asked > full);
    let paged = Paged {
        sequences: sequences as u32,
        drafts: options.drafts as u32,
        page: page as u32,
        pages: pages.map(|n| n as u32),
    };
    Ok((Plan { paged: Some(paged), ..plan }, sizes))
}
