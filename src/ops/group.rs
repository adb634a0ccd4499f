//! The routes of a step by expert, so that an expert's weights are read once for all of them.

use super::{Op, Views};
use crate::program::{Launch, Program, Slice};
use crate::shader::{Kernel, TILES};
use std::borrow::Cow;

pub(crate) const KERNEL: Kernel =
    Kernel { name: "group", source: include_str!("../../shaders/group.wgsl"), slots: &[TILES] };

/// Most routes of a tile: the tokens that `tile_8` and `tile_8x4` carry.
const ROUTES: usize = 8;
/// Most routes of a tile for matrix units.
const MATRIX_ROUTES: usize = 64;

/// Constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Experts, at most 1024.
    pub e: u32,
    /// Experts per token.
    pub a: u32,
    /// For kernels with matrix units, whose tiles hold 64 routes; else 8.
    pub matrix: bool,
}

/// Routes that go to one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Tile {
    /// The expert.
    pub expert: u32,
    /// How many routes; 0 in a tile that is not used.
    pub count: u32,
    /// The routes, `t A + a`, in order; zeros behind them.
    pub routes: [u32; ROUTES],
}

/// How the routes of a step are given to the experts' matrices. It changes no bit.
#[derive(Clone, Copy, Debug)]
pub enum Routing {
    /// One by one: `[T, A]` u32, the expert of each.
    Each(Slice),
    /// In the tiles of [`Program::group`].
    Grouped(Slice),
    /// In its larger tiles, for matrix units.
    ByMatrix(Slice),
}

impl From<Slice> for Routing {
    fn from(experts: Slice) -> Self {
        Self::Each(experts)
    }
}

impl Routing {
    /// The tile that workgroups carry, their number, and how many rows of weights a lane has.
    pub(crate) fn tile(self, tokens: u32, a: u32, e: u32) -> (&'static str, u32, u32) {
        let op = Group { e, a, matrix: matches!(self, Self::ByMatrix(_)) };
        match self {
            Self::ByMatrix(_) => ("", op.tiles(tokens), 0),
            Self::Each(_) => ("tile_1x2", tokens * a, 2),
            // Where an expert has a full tile on average there is enough to do with four rows a lane.
            Self::Grouped(_) if tokens * a >= e * ROUTES as u32 => ("tile_8x4", op.tiles(tokens), 4),
            Self::Grouped(_) => ("tile_8", op.tiles(tokens), 2),
        }
    }
}

impl Launch {
    /// Bind routes and fill slot `routes`.
    pub(crate) fn routes(self, routing: Routing) -> Self {
        match routing {
            Routing::Each(experts) => self.fill("routes", "routes_each").read("experts", experts),
            Routing::Grouped(tiles) => self.fill("routes", "routes_grouped").read("tiles", tiles),
            Routing::ByMatrix(tiles) => self.read("tiles", tiles),
        }
    }
}

impl Program {
    /// The routes of the step by expert. `step`: uniform with T; `experts`: `[T, A]` u32; `tiles`: [`Group::tiles`] of
    /// [`Tile`].
    pub fn group(&mut self, op: Group, step: Slice, experts: Slice, tiles: Slice) {
        let launch = Launch::new(Op::Group(op), &KERNEL, [1, 1, 1])
            .constant("E", op.e)
            .constant("A", op.a)
            .fill("tiles", if op.matrix { "tiles_64" } else { "tiles_8" })
            .read("step", step)
            .read("experts", experts)
            .write("tiles", tiles);
        self.push(launch);
    }
}

impl Group {
    /// Routes of a tile.
    fn routes(&self) -> usize {
        if self.matrix { MATRIX_ROUTES } else { ROUTES }
    }

    /// Bytes of a tile.
    pub(crate) fn tile_bytes(&self) -> u64 {
        (2 + self.routes() as u64) * 4
    }

    /// Tiles that `tokens` rows may need: every expert that has routes may have a tile that is not full.
    pub fn tiles(&self, tokens: u32) -> u32 {
        let (routes, full) = (tokens * self.a, self.routes() as u32);
        (routes + (full - 1) * routes.min(self.e)) / full
    }

    pub(crate) fn twin(&self, tokens: usize, views: &mut Views<'_>) {
        let experts = &views.words("experts")[..tokens * self.a as usize];
        let words = self.tiles(tokens as u32) as usize * (2 + self.routes());
        self.reference(experts, &mut views.words_mut("tiles")[..words]);
    }

    /// `experts [T, A]`; `tiles`: the words of as many as there can be: expert, count, routes.
    pub fn reference(&self, experts: &[u32], tiles: &mut [u32]) {
        tiles.fill(0);
        let mut next = tiles.chunks_exact_mut(2 + self.routes());
        for expert in 0..self.e {
            let routes = || (0..experts.len() as u32).filter(|route| experts[*route as usize] == expert);
            let routes: Vec<u32> = routes().collect();
            for (some, tile) in routes.chunks(self.routes()).zip(&mut next) {
                tile[..2].copy_from_slice(&[expert, some.len() as u32]);
                tile[2..2 + some.len()].copy_from_slice(some);
            }
        }
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
        let tiles = self.words("tiles").chunks_exact(2 + op.routes()).take(op.tiles(tokens as u32) as usize);
        for tile in tiles {
            for route in &tile[2..2 + (tile[1] as usize).min(op.routes())] {
                if let Some(expert) = experts.get_mut(*route as usize) {
                    *expert = tile[0];
                }
            }
        }
        Cow::Owned(experts)
    }
}
