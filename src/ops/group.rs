//! The routes of a step by expert, so that an expert's weights are read once for all of them.

use super::{Op, Router, Routes, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{Kernel, TILES};
use std::borrow::Cow;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "group", source: include_str!("../../shaders/group.wgsl"), slots: &[TILES] };

/// For experts that are chosen on the way.
pub(crate) const CHOSEN: Kernel =
    Kernel { name: "group_chosen", source: include_str!("../../shaders/group_chosen.wgsl"), slots: &[TILES] };

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Experts, at most 1024.
    pub e: u32,
    /// Experts per token.
    pub a: u32,
    /// Most routes of a tile: 2 or 4, or 16 or 64 for matrix units. A tile is as many words, behind its expert and how many of
    /// them are routes, `t A + a`, in order: the others are zeros. 0 routes: a tile that is not used.
    pub routes: u32,
}

/// Constants of choosing the experts of few rows, and grouping their routes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ChosenGroup {
    /// The choice.
    pub router: Router,
    /// What becomes of it.
    pub group: Group,
}

/// How the routes of a step are given to the experts' matrices. It changes no bit.
#[derive(Clone, Copy, Debug)]
pub enum Routing {
    /// One by one: `[T, A]` u32, the expert of each.
    Each(Slice),
    /// One by one, and chosen on the way by these scores, `[T, E]` f32: for `moe_up`, of a weight in one part. It writes the
    /// routes.
    Chosen(Router, Slice, Routes),
    /// In the tiles of [`Program::group`], of 2 or 4.
    Grouped(Slice, u32),
    /// In its tiles of 16 or 64, for matrix units.
    ByMatrix(Slice, u32),
}

impl From<Slice> for Routing {
    fn from(experts: Slice) -> Self {
        Self::Each(experts)
    }
}

/// What workgroups carry.
pub(super) struct Carried {
    /// The filling of slot `tile`.
    pub(super) tile: &'static str,
    /// How many tiles of routes there can be.
    pub(super) tiles: u32,
    /// Rows of weights of a workgroup.
    pub(super) rows: u32,
    /// Spans of K that a group of lanes has.
    pub(super) spans: u32,
}

impl Routing {
    /// Most routes of a tile.
    pub fn routes(self) -> u32 {
        match self {
            Self::Each(_) | Self::Chosen(..) => 1,
            Self::Grouped(_, routes) | Self::ByMatrix(_, routes) => routes,
        }
    }

    pub(super) fn carried(self, tokens: u32, a: u32, e: u32) -> Carried {
        let tiles = Group { e, a, routes: self.routes() }.tiles(tokens);
        let (tile, rows, spans) = match self.routes() {
            1 => ("tile_1x4", 16, 1),
            2 => ("tile_2x4", 32, 1),
            _ => ("tile_4x4", 64, 2),
        };
        Carried { tile, tiles, rows, spans }
    }
}

/// The filling of slot `tiles`.
fn file_of(routes: u32) -> &'static str {
    match routes {
        2 => "tiles_2",
        4 => "tiles_4",
        16 => "tiles_16",
        64 => "tiles_64",
        other => unreachable!("no kernel has tiles of {other} routes"),
    }
}

impl Launch {
    /// Fill slot `tile`, and say how much of an expert a workgroup has.
    pub(super) fn carried(self, tile: &'static str, [rows, spans]: [u32; 2]) -> Self {
        self.fill("tile", tile).constant("ROWS", rows).constant("SPANS", spans)
    }

    fn grouped(self, op: Group, step: Slice, tiles: Slice) -> Self {
        self.constant("E", op.e)
            .constant("A", op.a)
            .fill("tiles", file_of(op.routes))
            .read("step", step)
            .write("tiles", tiles)
    }

    /// Bind routes and fill slot `routes`.
    pub(crate) fn routes(self, routing: Routing) -> Self {
        match routing {
            Routing::Each(experts) => self.fill("routes", "routes_each").read("experts", experts),
            Routing::Chosen(op, scores, routes) => self
                .fill("routes", "routes_chosen")
                .constant("E", op.e)
                .constant("A", op.a)
                .constant("ALL", u32::from(!op.normalise))
                .read("scores", scores)
                .write("experts", routes.experts)
                .write("weights", routes.weights),
            Routing::Grouped(tiles, routes) => {
                self.fill("routes", "routes_grouped").fill("tiles", file_of(routes)).read("tiles", tiles)
            }
            Routing::ByMatrix(tiles, routes) => self.fill("tiles", file_of(routes)).read("tiles", tiles),
        }
    }
}

impl Program {
    /// The routes of the step by expert. `step`: uniform with T; `experts`: `[T, A]` u32; `tiles`: [`Group::tiles`].
    pub fn group(&mut self, op: Group, step: Slice, experts: Slice, tiles: Slice) {
        let launch = Launch::new(Op::Group(op), &KERNEL, [1, 1, 1]);
        self.push(launch.grouped(op, step, tiles).read("experts", experts));
    }

    /// [`Program::router`] and [`Program::group`] in one launch, of a step that [`ChosenGroup::takes`].
    pub fn choose_and_group(&mut self, op: ChosenGroup, step: Slice, scores: Slice, routes: Routes, tiles: Slice) {
        self.push(op.launch(step, scores, routes, tiles));
    }
}

impl Group {
    /// Words of a tile.
    pub fn words(&self) -> usize {
        2 + self.routes as usize
    }

    /// Bytes of a tile.
    pub(crate) fn tile_bytes(&self) -> u64 {
        self.words() as u64 * 4
    }

    /// Tiles that `tokens` rows may need: every expert that has routes may have a tile that is not full.
    pub fn tiles(&self, tokens: u32) -> u32 {
        let (routes, full) = (tokens * self.a, self.routes);
        (routes + (full - 1) * routes.min(self.e)) / full
    }

    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let experts = &views.words("experts")[..tokens * self.a as usize];
        let words = self.tiles(tokens as u32) as usize * self.words();
        self.reference(experts, &mut views.words_mut("tiles")[..words]);
    }

    /// `experts [T, A]`; `tiles`: the words of as many as there can be: expert, count, routes.
    pub fn reference(&self, experts: &[u32], tiles: &mut [u32]) {
        tiles.fill(0);
        let mut next = tiles.chunks_exact_mut(self.words());
        for expert in 0..self.e {
            let routes = || (0..experts.len() as u32).filter(|route| experts[*route as usize] == expert);
            let routes: Vec<u32> = routes().collect();
            for (some, tile) in routes.chunks(self.routes as usize).zip(&mut next) {
                tile[..2].copy_from_slice(&[expert, some.len() as u32]);
                tile[2..2 + some.len()].copy_from_slice(some);
            }
        }
    }
}

impl ChosenGroup {
    /// Whether one workgroup chooses for so many rows.
    pub fn takes(router: &Router, tokens: u32) -> bool {
        tokens * router.e.div_ceil(4) <= 256 && tokens * router.a <= 256
    }

    /// Launches that were recorded one by one, with a choice and a grouping that follow each other in one launch, as a step does it.
    pub(crate) fn join(launches: &[Launch]) -> Vec<Launch> {
        let mut joined: Vec<Launch> = Vec::new();
        for launch in launches {
            let before = joined.last().map(|before| (&before.op, before.grid[0]));
            match (&launch.op, before) {
                (Op::Group(group), Some((Op::Router(router), tokens))) if Self::takes(router, tokens) => {
                    let op = Self { router: *router, group: *group };
                    let router = joined.pop().expect("it is the last");
                    let slice = |of: &Launch, name| of.args.iter().find(|arg| arg.name == name).expect("bound").slice;
                    let routes = Routes { experts: slice(&router, "experts"), weights: slice(&router, "weights") };
                    let (step, tiles) = (slice(launch, "step"), slice(launch, "tiles"));
                    joined.push(op.launch(step, slice(&router, "scores"), routes, tiles));
                }
                _ => joined.push(launch.clone()),
            }
        }
        joined
    }

    fn launch(self, step: Slice, scores: Slice, routes: Routes, tiles: Slice) -> Launch {
        Launch::new(Op::ChosenGroup(self), &CHOSEN, [1, 1, 1])
            .constant("ALL", u32::from(!self.router.normalise))
            .grouped(self.group, step, tiles)
            .read("scores", scores)
            .write("experts", routes.experts)
            .write("weights", routes.weights)
    }

    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let scores = &views.f32("scores")[..tokens * self.router.e as usize];
        let (experts, weights) = (views.words_mut("experts"), views.f32_mut("weights"));
        let experts = &mut experts[..tokens * self.router.a as usize];
        let words = self.group.tiles(tokens as u32) as usize * self.group.words();
        self.reference(scores, experts, weights, &mut views.words_mut("tiles")[..words]);
    }

    /// `scores [T, E]`, `experts`, `weights`: `[T, A]`; `tiles` as [`Group::reference`] makes them.
    pub fn reference(&self, scores: &[f32], experts: &mut [u32], weights: &mut [f32], tiles: &mut [u32]) {
        self.router.reference(scores, experts, weights);
        self.group.reference(experts, tiles);
    }
}

impl<'a> Views<'a> {
    /// The expert of each route of `tokens` rows, however the routes are given. A route that stands in no tile has none.
    pub(crate) fn experts(&mut self, op: Group, tokens: usize) -> Cow<'a, [u32]> {
        let routes = tokens * op.a as usize;
        if self.has("experts") {
            return Cow::Borrowed(&self.words("experts")[..routes]);
        }
        let mut experts = vec![u32::MAX; routes];
        // What follows was left by a step of more rows.
        let tiles = self.words("tiles").chunks_exact(op.words()).take(op.tiles(tokens as u32) as usize);
        for tile in tiles {
            for route in &tile[2..2 + (tile[1] as usize).min(op.routes as usize)] {
                if let Some(expert) = experts.get_mut(*route as usize) {
                    *expert = tile[0];
                }
            }
        }
        Cow::Owned(experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{BufferId, HostStages};

    #[test]
    fn what_was_recorded_apart_is_joined_as_a_step_records_it() {
        let slice = |id| Slice { buffer: BufferId(id), offset: 0, bytes: 4096 };
        let [step, scores, tiles] = [0, 1, 2].map(slice);
        let routes = Routes { experts: slice(3), weights: slice(4) };
        let record = |tokens: u32, at_once: bool| {
            let router = Router { e: 32, a: 4, normalise: false };
            let group = Group { e: 32, a: 4, routes: 2 };
            let mut p = Program::new(tokens, HostStages::default());
            if at_once {
                p.choose_and_group(ChosenGroup { router, group }, step, scores, routes, tiles);
            } else {
                p.router(router, scores, routes);
                p.group(group, step, routes.experts, tiles);
            }
            p.launches
        };
        let joined = |tokens| format!("{:?}", ChosenGroup::join(&record(tokens, false)));
        assert_eq!(joined(8), format!("{:?}", record(8, true)));
        assert_eq!(joined(64), format!("{:?}", record(64, false)), "64 rows of 32 scores do not fit");
    }
}
